"""What the authors of these models published: one record per model, and nothing that was not published."""

from dataclasses import dataclass
from typing import Any

SCHEME = "deformable-detr://"


@dataclass(frozen=True)
class PublishedModel:
    """A model trained by its authors on COCO 2017, and where its weights are.

    Attributes:
        name: ours; the stem of the files under ``configs/COCO-Detection``.
        title: what the authors call it.
        repository: owner/name on GitHub of the authors' code, which publishes the numbers.
        epochs: of the training.
        batch: images of a step.
        official_file: the name under which the authors offer the file; "" where they do not say.
        ap, ap_small, ap_medium, ap_large: on COCO val2017, published by the repository for these weights; None where
            it does not say.
        params: number of parameters with the class outputs of the authors' file, counted in their code; with a Swin
            of H-Deformable-DETR added up from the parts.
        gflops: published by the repository; None where it does not say.
        hub_repository: owner/name on the Hugging Face Hub, of the authors' weights in the names of transformers.
        drive_id: of the official file on Google Drive.
        address: of the official file, for programs.
        drive_folder: address of the folder on Google Drive in which a person finds the official file.
        size: of the file that is downloaded in bytes; None where it is not known.
        sha256: of that file; None where it is not known.
        code_licence, weights_licence: SPDX names.
    """

    name: str
    title: str
    repository: str
    epochs: int
    batch: int
    official_file: str
    ap: float
    params: int
    ap_small: float | None = None
    ap_medium: float | None = None
    ap_large: float | None = None
    gflops: int | None = None
    hub_repository: str | None = None
    drive_id: str | None = None
    address: str | None = None
    drive_folder: str | None = None
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
    def repository_page(self) -> str:
        return f"https://github.com/{self.repository}"

    @property
    def drive_page(self) -> str | None:
        """The official file on Google Drive, or the folder that it is in."""
        return f"https://drive.google.com/file/d/{self.drive_id}/view" if self.drive_id else self.drive_folder

    @property
    def cached_file(self) -> str:
        """Name in the cache of what is downloaded, under which a file put there by hand is taken too."""
        return f"{self.name}.safetensors" if self.hub_repository else f"{self.name}.pth"


def _deformable_detr(**fields: Any) -> PublishedModel:
    """Return the record of a model of the first repository, whose trainings are all alike."""
    return PublishedModel(repository="fundamentalvision/Deformable-DETR", epochs=50, batch=32, **fields)


def _detr(**fields: Any) -> PublishedModel:
    """Return the record of a model of DETR's repository; its APs by size are in the paper's table 1."""
    file = fields["official_file"]
    return PublishedModel(
        repository="facebookresearch/detr",
        epochs=500,
        batch=64,
        address=f"https://dl.fbaipublicfiles.com/detr/{file}",
        **fields,
    )


def _h_deformable_detr(*, title: str, epochs: int, file: str, **fields: Any) -> PublishedModel:
    """Return the record of a model of H-Deformable-DETR.

    Args:
        file: what the name of its file begins with.
    """
    rest = "_dp0_mqs_lft_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage"
    official_file = f"{file}{rest}_{epochs}eps.pth"
    return PublishedModel(
        title=title,
        repository="HDETR/H-Deformable-DETR",
        epochs=epochs,
        batch=16,
        official_file=official_file,
        address=f"https://github.com/HDETR/H-Deformable-DETR/releases/download/v0.1/{official_file}",
        code_licence="MIT",
        weights_licence="MIT",
        **fields,
    )


def _dino(*, official_file: str = "", **fields: Any) -> PublishedModel:
    """Return the record of a model of DINO, all files of which are in one folder."""
    folder = "https://drive.google.com/drive/folders/1qD5m1NmK0kjE5hh-G17XUX751WsEG-h_"
    return PublishedModel(
        repository="IDEA-Research/DINO", batch=16, official_file=official_file, drive_folder=folder, **fields
    )


_HYBRID_R_50 = {
    "title": "H-Deformable-DETR + tricks",
    "file": "r50_hybrid_branch_lambda1_group6_t1500",
    "params": 47_946_073,
}
_HYBRID_SWIN_T = {
    "title": "H-Deformable-DETR + tricks, Swin-T, weight decay 0.05",
    "file": "decay0.05_swin_tiny_hybrid_branch_lambda1_group6_t1500",
    "params": 48_489_107,
}

_PUBLISHED = (
    _detr(
        name="detr_R_50",
        title="DETR",
        hub_repository="facebook/detr-resnet-50",
        official_file="detr-r50-e632da11.pth",
        ap=42.0,
        ap_small=20.5,
        ap_medium=45.8,
        ap_large=61.1,
        params=41_524_768,
        gflops=86,
    ),
    _detr(
        name="detr_R_50_DC5",
        title="DETR (DC5)",
        hub_repository="facebook/detr-resnet-50-dc5",
        official_file="detr-r50-dc5-f0fb7ef5.pth",
        ap=43.3,
        ap_small=22.5,
        ap_medium=47.3,
        ap_large=61.1,
        params=41_524_768,
        gflops=187,
    ),
    _detr(
        name="detr_R_101",
        title="DETR, ResNet-101",
        hub_repository="facebook/detr-resnet-101",
        official_file="detr-r101-2c7b67e5.pth",
        ap=43.5,
        ap_small=21.9,
        ap_medium=48.0,
        ap_large=61.8,
        params=60_464_672,
        gflops=152,
    ),
    _detr(
        name="detr_R_101_DC5",
        title="DETR (DC5), ResNet-101",
        hub_repository="facebook/detr-resnet-101-dc5",
        official_file="detr-r101-dc5-a2e86def.pth",
        ap=44.9,
        ap_small=23.7,
        ap_medium=49.5,
        ap_large=62.3,
        params=60_464_672,
        gflops=253,
    ),
    _deformable_detr(
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
    _deformable_detr(
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
    _deformable_detr(
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
    _deformable_detr(
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
    _deformable_detr(
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
    _h_deformable_detr(name="h_deformable_detr_R_50", epochs=12, ap=48.7, **_HYBRID_R_50),
    _h_deformable_detr(name="h_deformable_detr_R_50_36ep", epochs=36, ap=50.0, **_HYBRID_R_50),
    _h_deformable_detr(name="h_deformable_detr_swin_tiny", epochs=12, ap=51.2, **_HYBRID_SWIN_T),
    _h_deformable_detr(name="h_deformable_detr_swin_tiny_36ep", epochs=36, ap=53.7, **_HYBRID_SWIN_T),
    _h_deformable_detr(
        name="h_deformable_detr_swin_large",
        title="H-Deformable-DETR + tricks, Swin-L, 900 queries",
        epochs=12,
        file="swin_large_hybrid_branch_lambda1_group6_t1500_n900",
        ap=56.1,
        params=218_233_517,
    ),
    _h_deformable_detr(
        name="h_deformable_detr_swin_large_36ep",
        title="H-Deformable-DETR + tricks, Swin-L, 900 queries, weight decay 0.05",
        epochs=36,
        file="decay0.05_drop_path0.5_swin_large_hybrid_branch_lambda1_group6_t1500_n900",
        ap=57.8,
        params=218_233_517,
    ),
    _dino(
        name="dino_R_50_4scale",
        title="DINO-4scale",
        epochs=12,
        official_file="checkpoint0011_4scale.pth",
        ap=49.0,
        params=46_893_182,
    ),
    _dino(
        name="dino_R_50_4scale_24ep",
        title="DINO-4scale",
        epochs=24,
        official_file="checkpoint0023_4scale.pth",
        ap=50.4,
        params=46_893_182,
    ),
    _dino(name="dino_R_50_4scale_36ep", title="DINO-4scale", epochs=36, ap=50.9, params=46_893_182),
    _dino(
        name="dino_R_50_5scale",
        title="DINO-5scale",
        epochs=12,
        official_file="checkpoint0011_5scale.pth",
        ap=49.4,
        params=47_255_806,
    ),
    _dino(name="dino_swin_large_4scale", title="DINO-4scale, Swin-L", epochs=12, ap=56.8, params=217_230_066),
    _dino(name="dino_swin_large_4scale_36ep", title="DINO-4scale, Swin-L", epochs=36, ap=58.0, params=217_230_066),
)
MODELS = {model.name: model for model in _PUBLISHED}

# Configurations of this project's own that nobody has trained on COCO: of each the model that it starts from.
RECIPES = {"deformable_detr_R_50_two_stage_plus": "deformable_detr_R_50_two_stage"}


def check_name(name: str) -> None:
    """Raise KeyError if there is neither a model nor a recipe of this name; lists those there are."""
    if name not in MODELS and name not in RECIPES:
        raise KeyError(f"there is no model {name!r} in the zoo; there are {', '.join([*MODELS, *RECIPES])}")


def find_model(name: str) -> PublishedModel:
    """Return the record of a published model.

    Raises:
        KeyError: if there is no such model, or if it is a recipe.
    """
    check_name(name)
    if name in RECIPES:
        start = MODELS[RECIPES[name]].weights
        raise KeyError(f"{name} is a recipe without published weights: train it, from {start} or from a backbone")
    return MODELS[name]
