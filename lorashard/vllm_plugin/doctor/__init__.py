"""What `lorashard doctor` says: `survey` looks, `diagnosis` decides."""
