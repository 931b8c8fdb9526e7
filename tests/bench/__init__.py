"""Speed and memory of lorashard against plain tools: `python -m tests.bench`."""
