"""The application: requests, sessions and what runs on them. Every caller uses this package."""
