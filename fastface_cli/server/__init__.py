"""`fastface serve`: requests over HTTP become runs of a session; the page and the APIs share one queue."""
