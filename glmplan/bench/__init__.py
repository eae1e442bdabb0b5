"""How fast is a running server? Load, measurement and comparison; nothing here prints."""
