"""Files that come from elsewhere: which there are, how they are downloaded, what is in them."""
