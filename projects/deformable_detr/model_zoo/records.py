"""What the authors of Deformable DETR published: one record per model, and nothing that was not published."""

from dataclasses import dataclass

SCHEME = "deformable-detr://"


@dataclass(frozen=True)
class PublishedModel:
    """A model of the official repository, all of them ResNet-50, 50 epochs of COCO 2017, total batch 32.

    Attributes:
        name: ours; the stem of the files under ``configs/COCO-Detection``.
        title: what the authors call it.
        hub_repository: owner/name on the Hugging Face Hub, of the authors' weights in the names of transformers.
        drive_id: of the official ``.pth`` on Google Drive.
        official_file: the name under which Google Drive offers that file.
        ap, ap_small, ap_medium, ap_large: on COCO val2017, published by the official repository for these weights.
        params: number of parameters with 91 class outputs, counted in the official code.
        gflops: published by the official repository.
        size: of the Hub's file in bytes; None where it is not known.
        sha256: of the Hub's file; None where it is not known.
        code_licence, weights_licence: SPDX names.
    """

    name: str
    title: str
    hub_repository: str
    drive_id: str
    official_file: str
    ap: float
    ap_small: float
    ap_medium: float
    ap_large: float
    params: int
    gflops: int
    size: int | None = None
    sha256: str | None = None
    code_licence: str = "Apache-2.0"
    weights_licence: str = "Apache-2.0"

    @property
    def weights(self) -> str:
        """What to give as ``MODEL.WEIGHTS``."""
        return SCHEME + self.name

    @property
    def hub_page(self) -> str:
        return f"https://huggingface.co/{self.hub_repository}"

    @property
    def hub_file(self) -> str:
        """Path of the weights below the address of the Hub."""
        return f"{self.hub_repository}/resolve/main/model.safetensors"

    @property
    def drive_page(self) -> str:
        return f"https://drive.google.com/file/d/{self.drive_id}/view"

    @property
    def cached_file(self) -> str:
        """Name in the cache of the Hub's file, which is called the same for every model there."""
        return f"{self.name}.safetensors"


_PUBLISHED = (
    PublishedModel(
        name="deformable_detr_R_50_single_scale",
        title="Deformable DETR (single scale)",
        hub_repository="SenseTime/deformable-detr-single-scale",
        drive_id="1WEjQ9_FgfI5sw5OZZ4ix-OKk-IJ_-SDU",
        official_file="r50_deformable_detr_single_scale-checkpoint.pth",
        ap=39.4,
        ap_small=20.6,
        ap_medium=43.0,
        ap_large=55.5,
        params=34_066_593,
        gflops=78,
    ),
    PublishedModel(
        name="deformable_detr_R_50_single_scale_dc5",
        title="Deformable DETR (single scale, DC5)",
        hub_repository="SenseTime/deformable-detr-single-scale-dc5",
        drive_id="1m_TgMjzH7D44fbA-c_jiBZ-xf-odxGdk",
        official_file="r50_deformable_detr_single_scale_dc5-checkpoint.pth",
        ap=41.5,
        ap_small=24.1,
        ap_medium=45.3,
        ap_large=56.0,
        params=34_066_593,
        gflops=128,
    ),
    PublishedModel(
        name="deformable_detr_R_50",
        title="Deformable DETR",
        hub_repository="SenseTime/deformable-detr",
        drive_id="1nDWZWHuRwtwGden77NLM9JoWe-YisJnA",
        official_file="r50_deformable_detr-checkpoint.pth",
        ap=44.5,
        ap_small=27.1,
        ap_medium=47.6,
        ap_large=59.6,
        params=40_069_665,
        gflops=173,
    ),
    PublishedModel(
        name="deformable_detr_R_50_box_refine",
        title="+ iterative bounding box refinement",
        hub_repository="SenseTime/deformable-detr-with-box-refine",
        drive_id="1JYKyRYzUH7uo9eVfDaVCiaIGZb5YTCuI",
        official_file="r50_deformable_detr_plus_iterative_bbox_refinement-checkpoint.pth",
        ap=46.2,
        ap_small=28.3,
        ap_medium=49.2,
        ap_large=61.5,
        params=40_849_660,
        gflops=173,
    ),
    PublishedModel(
        name="deformable_detr_R_50_two_stage",
        title="++ two-stage Deformable DETR",
        hub_repository="SenseTime/deformable-detr-with-box-refine-two-stage",
        drive_id="15I03A7hNTpwuLNdfuEmW9_taZMNVssEp",
        official_file="r50_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage-checkpoint.pth",
        ap=46.9,
        ap_small=29.6,
        ap_medium=50.1,
        ap_large=61.6,
        params=41_181_529,
        gflops=173,
    ),
)
MODELS = {model.name: model for model in _PUBLISHED}


def find_model(name: str) -> PublishedModel:
    """Return the record of a model.

    Raises:
        KeyError: if there is no such model; lists those there are.
    """
    if name not in MODELS:
        raise KeyError(f"there is no model {name!r} in the zoo; there are {', '.join(MODELS)}")
    return MODELS[name]
