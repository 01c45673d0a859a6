"""Detectron2's dataset dicts, the form in which an image and its annotations travel from the files to the model."""


def describe_image(record: dict) -> str:
    """Which image a dataset dict, or a model's input made of one, is about: for messages to the user."""
    return f"image {record.get('file_name', '<no file_name>')} (image_id {record.get('image_id', '<none>')})"


def get_objects(record: dict) -> list[dict]:
    """Return the annotations of an image that are objects, and not crowd regions: those to train on and to draw."""
    return [annotation for annotation in record.get("annotations", ()) if not annotation.get("iscrowd", 0)]
