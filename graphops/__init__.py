"""Graph operators and graph diffusion fields. They arrive in a coming version; this one holds only the door."""

__all__: list[str] = []
