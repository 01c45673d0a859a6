"""Configuration keys of this project, for Detectron2's yaml configurations."""

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode


def add_deformable_detr_config(cfg: CfgNode) -> None:
    """Add the keys of this project to a Detectron2 configuration; existing keys are never changed."""
    node = CfgNode()

    # Registered backbone, or timm/NAME, under MultiScaleBackbone, its outputs (finest first; names or strides), and the
    # number of levels L.
    node.BOTTOM_UP = "build_resnet_backbone"
    node.IN_FEATURES = ["res3", "res4", "res5"]
    node.NUM_FEATURE_LEVELS = 4
    # Norm after their projections to the width C: "GN", or "" for none, as in DETR.
    node.PROJECTION_NORM = "GN"

    # Class outputs; DETR has one more, "no object".
    node.NUM_CLASSES = 80
    # Detections before selection; with TWO_STAGE the number of proposals kept.
    node.NUM_QUERIES = 300
    node.WITH_BOX_REFINE = False
    node.TWO_STAGE = False
    # The same in evaluation, the first of learned queries; 0 for NUM_QUERIES.
    node.NUM_QUERIES_TEST = 0

    # Switches of DINO (arXiv 2203.03605) and H-DETR; docs/training.md says what they need and bring.
    node.MIXED_QUERY_SELECTION = False
    node.LOOK_FORWARD_TWICE = False
    node.ANCHOR_QUERY_POS = False
    node.MULTICLASS_PROPOSALS = False
    node.DECODER_NORM = False
    node.SHARED_HEADS = False
    # Keeps boxes off 0 and 1 where they are refined; 1e-3 in DINO.
    node.INVERSE_SIGMOID_EPS = 1e-5

    # Encoding of the cells' positions: ratio of the slowest to the fastest wavelength, and where in a cell its position
    # is; DINO has 20 and 0, DETR 10000 and 0.
    node.POSITION_TEMPERATURE = 10000.0
    node.POSITION_OFFSET = -0.5

    # Further queries in training, of which ONE2MANY_REPEAT are matched with each object, and the weight of their losses
    # (H-DETR). 0 for none.
    node.NUM_ONE2MANY_QUERIES = 0
    node.ONE2MANY_REPEAT = 6
    node.ONE2MANY_WEIGHT = 1.0
    # Denoising queries in training: pairs of a positive and a negative (about, per image), noise of labels and of boxes
    # (DINO). 0 pairs for none; needs TWO_STAGE.
    node.DN_NUMBER = 0
    node.DN_LABEL_NOISE_RATIO = 0.5
    node.DN_BOX_NOISE_SCALE = 1.0

    # Pad batches to multiples of so many pixels; 0 for the official canvas, the largest sides of the batch.
    node.SIZE_DIVISIBILITY = 0
    # Compute the same for an image whatever the canvas around it and the images beside it.
    node.PADDING_INVARIANT = False

    # Width C, heads M, layers, hidden width of the feed-forward networks, dropout probability.
    node.HIDDEN_DIM = 256
    node.NHEADS = 8
    node.ENC_LAYERS = 6
    node.DEC_LAYERS = 6
    node.DIM_FEEDFORWARD = 1024
    node.DROPOUT = 0.1
    # Compute every encoder and decoder layer a second time in the backward pass, in place of keeping its activations.
    node.ACTIVATION_CHECKPOINT = False
    # Let torch.compile make a program of the transformer for training.
    node.COMPILE = False
    # Record training steps of canvases that come again as CUDA graphs.
    node.CUDA_GRAPHS = False
    # Sampling points K of the paper, per head and level.
    node.ENC_N_POINTS = 4
    node.DEC_N_POINTS = 4

    # Loss weights, and supervision of every decoder layer.
    node.AUX_LOSS = True
    node.CLASS_WEIGHT = 2.0
    node.L1_WEIGHT = 5.0
    node.GIOU_WEIGHT = 2.0
    node.FOCAL_ALPHA = 0.25
    # Of DETR, which has a cross-entropy in place of the focal loss: weight of "no object" in it.
    node.EOS_COEF = 0.1
    # Weights of the matching costs.
    node.COST_CLASS = 2.0
    node.COST_L1 = 5.0
    node.COST_GIOU = 2.0
    _add_missing(cfg.MODEL, "DEFORMABLE_DETR", node)

    _add_backbones(cfg.MODEL)

    # AdamW with these factors on SOLVER.BASE_LR: for the backbone, and for the layers that produce locations
    # (sampling_offsets, reference_points).
    cfg.SOLVER.setdefault("OPTIMIZER", "ADAMW")
    cfg.SOLVER.setdefault("BACKBONE_MULTIPLIER", 0.1)
    cfg.SOLVER.setdefault("LOCATION_MULTIPLIER", 0.1)
    # Another factor for each block of the backbone (ViT, Swin) from there to its last one; 1 for none.
    cfg.SOLVER.setdefault("LAYER_DECAY", 1.0)
    # Values for parameters by the last part of their names: ("relative_position_bias_table", "weight_decay", 0.0), ...
    cfg.SOLVER.setdefault("OVERRIDES", [])

    # Colour jitter, each in [0, 1): a factor from [1 - x, 1 + x]; 0 for none.
    cfg.INPUT.setdefault("COLOR_JITTER", CfgNode({"BRIGHTNESS": 0.0, "CONTRAST": 0.0, "SATURATION": 0.0}))
    # Large-scale jitter in place of resize and crop: its side in pixels, 0 for none, and the range of its scale.
    cfg.INPUT.setdefault("LSJ", CfgNode({"SIZE": 0, "SCALE": [0.1, 2.0]}))

    # What mixed precision computes in: "float16" or "bfloat16".
    cfg.SOLVER.AMP.setdefault("PRECISION", "float16")
    # Parts in which the batch of a process goes through the model; IMS_PER_BATCH stays the batch of a step.
    cfg.SOLVER.setdefault("ACCUMULATION_STEPS", 1)
    # Let several processes train a model of which some parameters get no gradient.
    cfg.SOLVER.setdefault("FIND_UNUSED_PARAMETERS", False)
    # Steps with a non-finite loss or gradient that are left out before training stops.
    cfg.SOLVER.setdefault("MAX_SKIPPED_STEPS", 0)
    # Iterations between two lines of metrics.json; 1 writes the plain values of every iteration.
    cfg.SOLVER.setdefault("LOG_PERIOD", 20)
    # Parts as large as fit into the GPU's memory, tried with the largest images; sets ACCUMULATION_STEPS.
    cfg.SOLVER.setdefault("AUTO_BATCH", False)
    # Draw the first training images, as the model takes them, into the output folder (--show-data).
    cfg.DATALOADER.setdefault("SHOW_DATA", False)
    # Send what metrics.json gets to Weights & Biases too; without a NAME that of the output folder.
    cfg.setdefault("WANDB", CfgNode({"ENABLED": False, "PROJECT": "deformable_detr", "NAME": ""}))
    # A moving average of the weights, which is then what is evaluated.
    cfg.MODEL.setdefault("EMA", CfgNode({"ENABLED": False, "DECAY": 0.9997}))
    # One evaluation more, after so many iterations; 0 for none.
    cfg.TEST.setdefault("FIRST_EVAL", 0)
    # Metric whose best checkpoint is kept as model_best.pth, such as "bbox/AP"; "" for none.
    cfg.TEST.setdefault("BEST_METRIC", "")
    # End the run once so many evaluations were no better than the best one (by BEST_METRIC, or bbox/AP); 0 for never.
    cfg.TEST.setdefault("PATIENCE", 0)
    # Also evaluate the predictions of every decoder layer.
    cfg.TEST.setdefault("PER_LAYER_AP", False)


def _add_backbones(model: CfgNode) -> None:
    """Add the keys of backbones for which Detectron2 has none; those of another project are kept."""
    # Swin-T, under the names that Mask2Former has for these keys.
    swin = {"EMBED_DIM": 96, "DEPTHS": [2, 2, 6, 2], "NUM_HEADS": [3, 6, 12, 24], "WINDOW_SIZE": 7}
    # ViT-B; IMG_SIZE is that of its global position tables.
    vit = {"IMG_SIZE": 1024, "EMBED_DIM": 768, "DEPTH": 12, "NUM_HEADS": 12, "WINDOW_SIZE": 14, "DROP_PATH_RATE": 0.1}
    # RegNetX-4GF.
    regnet = {"DEPTH": 23, "W_A": 38.65, "W_0": 96, "W_M": 2.43, "GROUP_WIDTH": 40, "SE_RATIO": 0.0}
    nodes = {
        "SWIN": {**swin, "DROP_PATH_RATE": 0.2},
        "REGNET": {**regnet, "STEM_WIDTH": 32, "NORM": "FrozenBN"},
        # Of the pyramid on it: its width, and the side to which images are padded; 0 for any canvas.
        "VIT": {**vit, "OUT_CHANNELS": 256, "SQUARE_PAD": 1024},
        # OPTIONS: whatever timm.create_model takes for the model that BOTTOM_UP names.
        "TIMM": {"FROZEN_BN": True, "OPTIONS": CfgNode(new_allowed=True)},
    }
    for name, keys in nodes.items():
        _add_missing(model, name, keys)


def _add_missing(model: CfgNode, name: str, keys: Mapping[str, Any]) -> None:
    node = model.setdefault(name, CfgNode())
    for key, value in keys.items():
        node.setdefault(key, value)
