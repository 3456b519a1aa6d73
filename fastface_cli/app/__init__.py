"""The application: requests, sessions and what runs on them. Every caller stands on this package."""
