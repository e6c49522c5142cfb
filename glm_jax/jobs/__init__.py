"""Files in, files out: batch jobs."""
