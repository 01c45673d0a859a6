from ..layers.conftest import make_case

__all__ = ["make_case"]
