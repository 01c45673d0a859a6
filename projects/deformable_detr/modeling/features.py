"""Outputs of a backbone, by their names or by their strides."""

from collections.abc import Mapping, Sequence


def find_features(strides: Mapping[str, int], wanted: Sequence[str | int]) -> list[str]:
    """Return the names of those outputs of a backbone that a model takes.

    Args:
        strides: of all outputs by name, in the order in which they are computed.
        wanted: names, or strides in pixels. Of several outputs of one stride the last is meant: of a ResNet's stem and
            res2, res2.

    Raises:
        ValueError: if there is no such output.
    """
    by_stride = {stride: name for name, stride in strides.items()}
    names = [by_stride.get(feature, feature) for feature in wanted]
    if not names or not set(names) <= strides.keys():
        known = ", ".join(f"{name} ({stride})" for name, stride in strides.items())
        raise ValueError(f"in_features {list(wanted)} must name outputs of the backbone, or their strides: {known}")
    return names
