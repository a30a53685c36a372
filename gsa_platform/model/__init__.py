"""The decoder-only transformer that hosts the components."""
