"""From a dataset dict to what the model takes."""

from detectron2.data import DatasetMapper

from .dataset_dict import describe_image


class NamedErrorsMapper(DatasetMapper):
    """Detectron2's stock mapper whose errors about unreadable images say which image it was."""

    def __call__(self, dataset_dict: dict) -> dict:
        try:
            return super().__call__(dataset_dict)
        # Pillow reports broken files as OSError, SyntaxError (PNG) or ValueError (sizes).
        except (OSError, SyntaxError, ValueError) as error:
            raise OSError(f"cannot read {describe_image(dataset_dict)}: {error}") from error
