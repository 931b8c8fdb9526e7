"""What `lorashard inspect` and `plan` show: values -> numbers, nothing else."""
