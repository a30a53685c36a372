"""First-party components of gsa_platform, loaded through the same entry point as anyone's."""
