"""The job server: uploads, a durable job store, workers and the web page."""
