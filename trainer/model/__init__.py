"""Model architectures, and their way in and out of the Hugging Face layout."""
