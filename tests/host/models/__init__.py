"""Generated models, photos and other files that a test host needs."""
