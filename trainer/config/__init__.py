"""Every option of Tessera."""
