"""torchdiffeq's module tree, private names included, and its place in ``sys.modules``."""

from .install import install_as_torchdiffeq, uninstall_torchdiffeq

__all__ = ["install_as_torchdiffeq", "uninstall_torchdiffeq"]
