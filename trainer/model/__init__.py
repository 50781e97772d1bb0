"""Model architectures, and their import and export in the Hugging Face layout."""
