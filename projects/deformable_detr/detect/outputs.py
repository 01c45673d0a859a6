"""What is written beside annotated pictures: one picture per detection, and YOLO's text files."""

import math
import re
from pathlib import Path, PurePosixPath

import numpy as np
from detectron2.structures import Instances

from ..files import make_folder, write_text
from .images import save_image
from .inputs import distinct_name

_JPEG = ".jpg"


class SideFiles:
    """Writes files for each image or frame into folders below ``folder``.

    - ``crops/CLASS/NAME_1.jpg``, ``_2``, ...: what is inside of each box, best first, in the pixels of the image.
    - ``labels/NAME.txt``: see :func:`yolo_lines`; empty without detections. ``classes.txt`` names the classes.

    Frames are called ``NAME/000000``, ``NAME/000001``, ...

    Args:
        crops: write the first.
        txt: write the second.
    """

    def __init__(self, folder: Path, class_names: list[str], *, crops: bool, txt: bool) -> None:
        self.folder = folder
        self.class_names = class_names
        self.crops = crops
        self.txt = txt
        self._names: dict[Path, PurePosixPath] = {}
        self._taken: set[str] = set()
        self._folders_of_images: set[str] = set()
        if txt:
            write_text(folder / "classes.txt", "".join(f"{name}\n" for name in class_names))

    def write(self, picture: Path, rgb: np.ndarray, instances: Instances, *, frame: int | None = None) -> None:
        """Write the files of one image or frame.

        Args:
            picture: path of the annotated copy, below ``folder``, which gives the name.
            rgb: uint8 (H, W, 3), the whole image.
            instances: best first, in pixels of the image.
            frame: its number in a video.

        Raises:
            OSError: naming what cannot be written.
        """
        name = self._name_after(picture, is_video=frame is not None)
        if frame is not None:
            name = name / f"{frame:06}"
        if self.txt:
            path = self.folder / "labels" / f"{name}.txt"
            make_folder(path.parent)
            write_text(path, "".join(f"{line}\n" for line in yolo_lines(instances)))
        if self.crops:
            suffix = _JPEG if frame is not None else picture.suffix
            labels = instances.pred_classes.tolist()
            for number, (label, crop) in enumerate(zip(labels, cut_out(rgb, instances), strict=True), start=1):
                folder = self.folder / "crops" / _as_file_name(self.class_names[label])
                save_image(crop, folder / f"{name}_{number}{suffix}")

    def _name_after(self, picture: Path, *, is_video: bool) -> PurePosixPath:
        """Return the path below the folder without the suffix; of x.jpg and x.png the second becomes x_2.

        So does x.mp4 beside a folder x of images, which may be called as its frames are.
        """
        if picture not in self._names:
            path = PurePosixPath(picture.relative_to(self.folder).with_suffix("").as_posix())
            if is_video:
                self._taken |= self._folders_of_images
            else:
                self._folders_of_images.add(path.parent.as_posix().casefold())
            self._names[picture] = distinct_name(path, self._taken)
        return self._names[picture]


def yolo_lines(instances: Instances) -> list[str]:
    """Return detections as YOLO writes them: "label cx cy w h score", the box as shares of the image's sides."""
    height, width = instances.image_size
    boxes = instances.pred_boxes.tensor.double() / instances.pred_boxes.tensor.new_tensor([width, height] * 2)
    rows = zip(instances.pred_classes.tolist(), boxes.tolist(), instances.scores.tolist(), strict=True)
    return [
        f"{label} {(x0 + x1) / 2:.6f} {(y0 + y1) / 2:.6f} {x1 - x0:.6f} {y1 - y0:.6f} {score:.6f}"
        for label, (x0, y0, x1, y1), score in rows
    ]


def cut_out(rgb: np.ndarray, instances: Instances) -> list[np.ndarray]:
    """Return the part (h, w, 3) of an image (H, W, 3) below each box, with every pixel that a box touches."""
    height, width = rgb.shape[:2]
    crops = []
    for x0, y0, x1, y1 in instances.pred_boxes.tensor.tolist():
        left, top = min(math.floor(x0), width - 1), min(math.floor(y0), height - 1)
        crops.append(rgb[top : max(math.ceil(y1), top + 1), left : max(math.ceil(x1), left + 1)])
    return crops


def _as_file_name(class_name: str) -> str:
    return re.sub(r"[^\w \-]", "_", class_name).strip() or "_"
