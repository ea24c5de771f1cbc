"""RF-DETR (https://arxiv.org/abs/2511.09554): pixels -> features -> proposals -> decoder -> classes, boxes, masks.

Axis letters: B images, G groups, Q queries of a group, N = G·Q queries, K proposals of a group (K = min(Q, S)), S
tokens of all levels, D width, C classes, L decoder layers, H W patch grid, h w mask grid, V feature levels, M heads, P
sampling points. Boxes are `boxes_cxcywh`; see `boxes_rf_detr`.

In training all G groups run side by side, each with first-stage heads of its own (Group DETR,
https://arxiv.org/abs/2207.13085); inference runs the first. Module names are those of the original checkpoints, so that
the state dict has their names.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput, can_return_tuple

from .boxes_rf_detr import refine_boxes
from .checkpoint_files import RfDetrCheckpoint
from .checkpoint_layouts import is_original_layout  # noqa: F401  transformers < 5.8 copies direct imports only; see tests/test_structure.py
from .configuration_rf_detr import RfDetrConfig
from .decoder_rf_detr import RfDetrDecoder, sine_embedding
from .layers_rf_detr import ClassHead, GroupHeads, XavierLinear, ZeroEmbedding, box_head, first_rows
from .loss_rf_detr import rf_detr_loss
from .mask_head_rf_detr import RfDetrSegmentationHead
from .mask_points_rf_detr import fixed_points, random_points
from .matcher_rf_detr import LossWeights
from .modeling_rf_detr_dinov2 import RfDetrDinov2Backbone
from .predictions_rf_detr import StagePrediction
from .projector_rf_detr import RfDetrProjector
from .targets_rf_detr import read_targets  # noqa: F401  as above
from .validation import check_limit
from .variants_rf_detr import is_background_label

# Score 0 after the sigmoid, and finite in half precision.
BACKGROUND_LOGIT = -1e4


@dataclass
class RfDetrOutput(ModelOutput):
    """The output of the models; fields that a model does not compute are None. In training N = G·Q, else N = Q.

    Attributes:
        loss: float32 scalar, if labels were given.
        loss_dict: The losses by name; see [`rf_detr_loss`].
        logits: (B, N, C), class logits. There is no background class.
        pred_boxes: (B, N, 4) float32, (cx, cy, w, h) as fractions of the model's input.
        pred_masks: (B, N, h, w), mask logits on a grid of 1/4 of the input. None in a training step, which does not
            materialize masks.
        last_hidden_state: (B, N, D), the queries after the last decoder layer, normalized.
        intermediate_hidden_states: (B, L, N, D), the same of every layer.
        init_reference_points: (B, N, 4), the reference boxes, which the heads of every layer refine.
        backbone_features: (B, D, H, W), the finest level of the projector.
        enc_hidden_states: (B, G·K, D), the tokens that the first stage chose.
        enc_outputs_class: (B, G·K, C), their class logits.
        enc_outputs_coord: (B, G·K, 4), their boxes.
        enc_indices: (B, G·K) int64, their indices among the S tokens.
        hidden_states: L + 1 of (B, N, D), the queries before the first layer and after each, not normalized.
        attentions: L of (B, G·M, Q, Q), self-attention weights.
        cross_attentions: L of (B, N, M, V, P), weights of the points of deformable attention.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    pred_masks: Tensor | None = None
    last_hidden_state: Tensor | None = None
    intermediate_hidden_states: Tensor | None = None
    init_reference_points: Tensor | None = None
    backbone_features: Tensor | None = None
    enc_hidden_states: Tensor | None = None
    enc_outputs_class: Tensor | None = None
    enc_outputs_coord: Tensor | None = None
    enc_indices: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


class RfDetrBackbone(nn.Module):
    """DINOv2 and the projector."""

    def __init__(self, config: RfDetrConfig) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"encoder": RfDetrDinov2Backbone(config.backbone_config, config)})
        self.projector = RfDetrProjector(config)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Pixels (B, 3, height, width) -> feature levels (B, D, H, W), fine to coarse."""
        return self.projector(self.encoder["encoder"](pixel_values))


# -- padding ---------------------------------------------------------------------------------------------------------


def drop_full_mask(pixel_mask: Tensor | None) -> Tensor | None:
    """Return None for a mask of ones: without padding there is nothing to mask. A traced graph keeps its mask."""
    if pixel_mask is None or (not torch.compiler.is_compiling() and bool(pixel_mask.all())):
        return None
    return pixel_mask


def level_padding_masks(pixel_mask: Tensor, levels: Sequence[Tensor]) -> list[Tensor]:
    """`pixel_mask` (B, height, width), 1 = image -> bool (B, H, W) for each level, True = padding."""
    valid = pixel_mask[:, None].float()
    return [F.interpolate(valid, size=level.shape[-2:], mode="nearest")[:, 0] == 0 for level in levels]


def valid_ratios(paddings: Sequence[Tensor]) -> Tensor:
    """Return the part of each level that is image, (B, V, 4) as (width, height, width, height)."""
    ratios = [torch.stack([(~pad[:, 0]).float().mean(-1), (~pad[:, :, 0]).float().mean(-1)], -1) for pad in paddings]
    return torch.stack(ratios, dim=1).repeat(1, 1, 2)


def pool_features(features: Tensor, pixel_mask: Tensor | None) -> Tensor:
    """Return the mean of a feature map (B, D, H, W) over the patches without padding, (B, D) float32.

    For search in images this map, the projector's, is better than those of DINOv2: nearest neighbors among drawn scenes
    have more objects in common.
    """
    if pixel_mask is None:
        return features.float().mean((2, 3))
    [padding] = level_padding_masks(pixel_mask, [features])
    is_image = ~padding[:, None]
    return (features.float() * is_image).sum((2, 3)) / is_image.sum((2, 3)).clamp(min=1)


# -- first stage -----------------------------------------------------------------------------------------------------


def encoder_proposals(
    shapes: Sequence[tuple[int, int]], paddings: Sequence[Tensor] | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return an anchor box around the center of each token, with sides of 5 % on the first level, 10 % on the next.

    Returns:
        Anchors (B or 1, S, 4) as fractions of the image without padding, and which are invalid, bool (B or 1, S, 1):
        padding, or a number outside (0.01, 0.99). Invalid anchors are 0.
    """
    levels = []
    for level, (height, width) in enumerate(shapes):
        y = torch.arange(height, dtype=torch.float32, device=device) + 0.5
        x = torch.arange(width, dtype=torch.float32, device=device) + 0.5
        if paddings is None:
            y, x = y[None] / height, x[None] / width
        else:
            y = y / (~paddings[level][:, :, 0]).sum(-1, keepdim=True)
            x = x / (~paddings[level][:, 0]).sum(-1, keepdim=True)
        centers = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1)
        sizes = torch.full_like(centers, 0.05 * 2**level)
        levels.append(torch.cat([centers, sizes], dim=-1).flatten(1, 2))
    anchors = torch.cat(levels, dim=1)
    invalid = ~((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)
    if paddings is not None:
        invalid = invalid | torch.cat([pad.flatten(1) for pad in paddings], dim=1)[..., None]
    return anchors.masked_fill(invalid, 0.0), invalid


def flatten_levels(
    levels: Sequence[Tensor], pixel_mask: Tensor | None
) -> tuple[Tensor, list[tuple[int, int]], list[Tensor] | None]:
    """Return the tokens (B, S, D) of feature levels (B, D, H, W), the levels' (H, W), and their padding masks."""
    shapes = [(level.shape[-2], level.shape[-1]) for level in levels]
    memory = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
    return memory, shapes, None if pixel_mask is None else level_padding_masks(pixel_mask, levels)


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """Tokens (B, S, D) at indices (B, K) -> (B, K, D)."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))


class RfDetrTransformer(nn.Module):
    """The first stage of two-stage deformable DETR, with heads of its own for each group, and the decoder."""

    def __init__(self, config: RfDetrConfig) -> None:
        super().__init__()
        width, groups = config.d_model, range(config.group_detr)
        self.num_queries = config.num_queries
        self.decoder = RfDetrDecoder(config)
        self.enc_output = GroupHeads(XavierLinear(width, width) for _ in groups)
        self.enc_output_norm = GroupHeads(nn.LayerNorm(width) for _ in groups)
        self.enc_out_class_embed = GroupHeads(ClassHead(width, config.num_labels) for _ in groups)
        self.enc_out_bbox_embed = GroupHeads(box_head(width) for _ in groups)

    def select_two_stage_proposals(
        self, memory: Tensor, anchors: Tensor, invalid: Tensor, num_groups: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Choose the K best tokens of each group.

        Args:
            memory: (B, S, D).
            anchors: (B or 1, S, 4), the anchor box of each token.
            invalid: bool (B or 1, S, 1). These tokens are zeroed, but may be chosen, as in the original.
            num_groups: G.

        Returns:
            The chosen tokens (B, G·K, D), their class logits (B, G·K, C), their refined boxes (B, G·K, 4), and their
            indices among the S tokens (B, G·K).
        """
        memory = memory.masked_fill(invalid, 0.0)
        anchors = anchors.expand(memory.shape[0], -1, -1)
        num_kept = min(self.num_queries, memory.shape[1])
        groups = []
        for group in range(num_groups):
            tokens = self.enc_output_norm(self.enc_output(memory, group), group)
            scores = self.enc_out_class_embed(tokens, group).amax(-1)
            best = torch.topk(scores, num_kept, dim=1).indices
            # The heads run again on the chosen tokens, without the others: the backward pass keeps, and goes through, a
            # fraction of the tokens.
            chosen = self.predict_proposals(gather_tokens(memory, best), gather_tokens(anchors, best), group)
            groups.append((*chosen, best))
        tokens, logits, boxes, best = (torch.cat(parts, dim=1) for parts in zip(*groups, strict=True))
        return tokens, logits, boxes, best

    def predict_proposals(self, memory: Tensor, anchors: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """Memory (B, S, D) and anchors (B, S, 4) -> the group's tokens (B, S, D), class logits (B, S, C) and boxes.

        Of all tokens, these are what [`select_two_stage_proposals`] chooses from: the definition of its fast path.
        """
        tokens = self.enc_output_norm(self.enc_output(memory, group), group)
        boxes = refine_boxes(self.enc_out_bbox_embed(tokens, group), anchors)
        return tokens, self.enc_out_class_embed(tokens, group), boxes


# -- models ----------------------------------------------------------------------------------------------------------


class RfDetrPreTrainedModel(RfDetrCheckpoint):
    """What the models declare to transformers: loading, saving, initial weights, capabilities."""

    config_class = RfDetrConfig
    base_model_prefix = "model"  # no such attribute: transformers then reads keys behind `model.` unaided
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_attention_backend = True
    _no_split_modules = ["RfDetrDinov2Layer", "RfDetrDecoderLayer"]  # noqa: RUF012

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers looks for a phrase in the source; attention here reads the configuration when called

    def get_input_embeddings(self) -> None:
        """Return None: accelerate asks for the token embedding before it shards a model, and there is none."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Every layer sets its own. While transformers loads a model, torch.nn.init does not touch loaded tensors.
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def freeze_backbone(self) -> None:
        """Stop training DINOv2; the projector is still trained."""
        self.backbone[0].encoder["encoder"].set_trainable(False)

    def unfreeze_backbone(self) -> None:
        """Train DINOv2 again, except the mask token and the blocks after the last tap, which are not used."""
        self.backbone[0].encoder["encoder"].set_trainable(True)

    def set_drop_path(self, rate: float) -> None:
        """Set the stochastic depth of DINOv2: from 0 at the first block, linearly, to `rate` at the last."""
        self.backbone[0].encoder["encoder"].set_drop_path(rate)


class RfDetrModel(RfDetrPreTrainedModel):
    """Backbone and transformer, without the final heads.

    Example:
        >>> import torch
        >>> from transformers_rfdetr import RfDetrConfig, RfDetrModel
        >>> model = RfDetrModel(RfDetrConfig.from_variant("rf-detr-seg-nano")).eval()
        >>> model(torch.zeros(1, 3, 312, 312)).last_hidden_state.shape
        torch.Size([1, 100, 256])
    """

    def __init__(self, config: RfDetrConfig) -> None:
        super().__init__(config)
        with torch.device("meta"):  # too many parameters are refused before they take memory
            self._add_modules(config)
        check_limit("parameters", self.num_parameters())
        self._add_modules(config)
        self.post_init()

    def _add_modules(self, config: RfDetrConfig) -> None:
        """Create the modules, before the weights are initialised; models with heads add these."""
        num_rows = config.group_detr * config.num_queries
        self.backbone = nn.ModuleList([RfDetrBackbone(config)])
        self.transformer = RfDetrTransformer(config)
        self.refpoint_embed = ZeroEmbedding(num_rows, 4)
        self.query_feat = nn.Embedding(num_rows, config.d_model)

    @property
    def num_groups(self) -> int:
        """G: all query groups run in training, the first one in evaluation."""
        return self.config.group_detr if self.training else 1

    def forward_features(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> RfDetrOutput:
        """Run everything before the final heads; see [`RfDetrModel.forward`] for the arguments."""
        num_groups = self.num_groups
        levels = self.backbone[0](pixel_values)
        memory, shapes, paddings = flatten_levels(levels, pixel_mask)
        anchors, invalid = encoder_proposals(shapes, paddings, memory.device)
        tokens, logits, boxes, chosen = self.transformer.select_two_stage_proposals(
            memory, anchors, invalid, num_groups
        )
        content, references = self.queries(boxes.detach(), num_groups)
        states, attentions, cross_attentions = self.decode(
            content, references, memory, shapes, paddings, output_attentions
        )
        decoded = [self.transformer.decoder.norm(state) for state in states[1:]]
        need_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return RfDetrOutput(
            last_hidden_state=decoded[-1],
            intermediate_hidden_states=torch.stack(decoded, dim=1),
            init_reference_points=references,
            backbone_features=levels[0],
            enc_hidden_states=tokens,
            enc_outputs_class=logits,
            enc_outputs_coord=boxes,
            enc_indices=chosen,
            hidden_states=states if need_states else None,
            attentions=attentions,
            cross_attentions=cross_attentions,
        )

    def all_proposals(self, levels: Sequence[Tensor], pixel_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return class logits (B, S, C) and boxes (B, S, 4) of all tokens, of which inference decodes the best K.

        Args:
            levels: The output of `backbone[0]`.
            pixel_mask: As for the model.
        """
        memory, shapes, paddings = flatten_levels(levels, drop_full_mask(pixel_mask))
        anchors, invalid = encoder_proposals(shapes, paddings, memory.device)
        anchors = anchors.expand(memory.shape[0], -1, -1)
        _, logits, boxes = self.transformer.predict_proposals(memory.masked_fill(invalid, 0.0), anchors, 0)
        return logits, boxes

    def queries(self, proposals: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
        """Return the decoder's input: learned contents (B, G·Q, D) and reference boxes (B, G·Q, 4).

        The first G·K references are the proposals (B, G·K, 4), refined by the learned deltas. If there are fewer
        proposals than queries, the others are the learned numbers themselves, as in the original.
        """
        batch, rows = proposals.shape[0], num_groups * self.config.num_queries
        learned = first_rows(self.refpoint_embed, rows, proposals.device).float().expand(batch, -1, -1)
        references = refine_boxes(learned[:, : proposals.shape[1]], proposals)
        references = torch.cat([references, learned[:, proposals.shape[1] :]], dim=1)
        # A copy: torch's FLOP counter expects a gradient function of a view of a parameter that no_grad did not record.
        return first_rows(self.query_feat, rows, proposals.device).repeat(batch, 1, 1), references

    def decode(
        self,
        content: Tensor,
        references: Tensor,
        memory: Tensor,
        shapes: Sequence[tuple[int, int]],
        paddings: Sequence[Tensor] | None,
        output_attentions: bool | None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """Run the decoder layers; see [`RfDetrOutput`] for the states and the weights of both attentions.

        All layers use the same references: RF-DETR does not refine them from layer to layer.
        """
        decoder = self.transformer.decoder
        need_weights = self.config.output_attentions if output_attentions is None else output_attentions
        padding = None if paddings is None else torch.cat([pad.flatten(1) for pad in paddings], dim=1)
        level_references = references[:, :, None]
        if paddings is not None:
            level_references = level_references * valid_ratios(paddings)[:, None]
        embedding = sine_embedding(level_references[:, :, 0], self.config.d_model)
        position = decoder.ref_point_head(embedding.to(content.dtype))
        states, attentions, cross_attentions = [content], [], []
        for layer in decoder.layers:
            content, self_weights, cross_weights = layer(
                content, position, level_references, memory, shapes, padding, self.num_groups, need_weights
            )
            states.append(content)
            attentions.append(self_weights)
            cross_attentions.append(cross_weights)
        if not need_weights:
            return tuple(states), None, None
        return tuple(states), tuple(attentions), tuple(cross_attentions)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> RfDetrOutput:
        """Return the decoded queries; with `return_dict=False` as a tuple.

        Args:
            pixel_values: (B, 3, height, width), normalized; each side a multiple of patch size x windows.
            pixel_mask: (B, height, width), 1 = image, 0 = padding. All ones is the same as None.
            output_attentions: Whether to return the attention weights, which uses eager attention.
            output_hidden_states: Whether to return the decoder's states.

        Raises:
            ValueError: the size is not a multiple of patch size x windows; the message has the nearest legal sizes.
        """
        return self.forward_features(pixel_values, drop_full_mask(pixel_mask), output_attentions, output_hidden_states)


class RfDetrForObjectDetection(RfDetrModel):
    """RF-DETR with class and box heads.

    Example:
        >>> import torch
        >>> from transformers_rfdetr import RfDetrConfig, RfDetrForObjectDetection
        >>> model = RfDetrForObjectDetection(RfDetrConfig.from_variant("rf-detr-nano")).eval()
        >>> outputs = model(torch.zeros(1, 3, 384, 384))
        >>> outputs.logits.shape, outputs.pred_boxes.shape
        (torch.Size([1, 300, 91]), torch.Size([1, 300, 4]))
    """

    def _add_modules(self, config: RfDetrConfig) -> None:
        super()._add_modules(config)
        self.class_embed = ClassHead(config.d_model, config.num_labels)
        self.bbox_embed = box_head(config.d_model)

    def last_stage(self, base: RfDetrOutput, image_size: tuple[int, int]) -> StagePrediction:
        """Return the prediction of the last decoder layer, for an input of `image_size` (height, width)."""
        hidden = base.last_hidden_state
        boxes = refine_boxes(self.bbox_embed(hidden), base.init_reference_points)
        return StagePrediction(self.class_embed(hidden), boxes)

    def stages(self, base: RfDetrOutput, image_size: tuple[int, int]) -> dict[str, StagePrediction]:
        """Return the prediction of each supervised stage, by the suffix of its losses; see [`rf_detr_loss`]."""
        hidden = base.intermediate_hidden_states
        logits = self.class_embed(hidden)
        boxes = refine_boxes(self.bbox_embed(hidden), base.init_reference_points[:, None])
        last = hidden.shape[1] - 1
        stages = {"": StagePrediction(logits[:, last], boxes[:, last])}
        if self.config.auxiliary_loss:
            stages |= {f"_{layer}": StagePrediction(logits[:, layer], boxes[:, layer]) for layer in range(last)}
        stages["_enc"] = StagePrediction(base.enc_outputs_class, base.enc_outputs_coord)
        return stages

    def predict_stage(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> StagePrediction:
        """Return the last layer's prediction, with background logits masked and without dense masks."""
        pixel_mask = drop_full_mask(pixel_mask)
        base = self.forward_features(pixel_values, pixel_mask)
        last = self.last_stage(base, (pixel_values.shape[-2], pixel_values.shape[-1]))
        return last._replace(
            logits=self.mask_background_logits(last.logits),
            queries=base.last_hidden_state,
            features=pool_features(base.backbone_features, pixel_mask),
        )

    def mask_background_logits(self, logits: Tensor) -> Tensor:
        """Set the logits (B, N, C) of labels such as `__background__` to -1e4.

        Heads of rfdetr's fine-tuned checkpoints have rows for them, which are not classes.
        """
        labels = [label for label, name in self.config.id2label.items() if is_background_label(name)]
        if labels:
            logits = logits.clone()
            for label in labels:
                logits[..., label] = BACKGROUND_LOGIT
        return logits

    @torch.compiler.disable  # the matcher calls SciPy
    def loss(
        self,
        stages: dict[str, StagePrediction],
        labels: list[dict[str, Tensor]],
        num_objects: Tensor | Callable[[], Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the training objective: with random points in training, with fixed points in evaluation."""
        config = self.config
        count: Tensor | None = num_objects() if callable(num_objects) else num_objects
        weights = LossWeights(
            class_cost=config.class_cost,
            bbox_cost=config.bbox_cost,
            giou_cost=config.giou_cost,
            loss_ce=config.class_loss_coefficient,
            loss_bbox=config.bbox_loss_coefficient,
            loss_giou=config.giou_loss_coefficient,
            loss_mask_ce=config.mask_class_loss_coefficient,
            loss_mask_dice=config.mask_dice_loss_coefficient,
            focal_alpha=config.focal_alpha,
        )
        return rf_detr_loss(
            stages,
            labels,
            num_groups=self.num_groups,
            weights=weights,
            points=random_points if self.training else fixed_points,
            mask_point_sample_ratio=config.mask_point_sample_ratio,
            num_boxes=None if count is None else (count * self.num_groups).clamp(min=1.0),
            across_ranks=self.training,
        )

    # Outside of compiled graphs, which would be compiled anew for every number of objects; what it calls is compiled.
    @torch.compiler.disable(recursive=False)
    def _forward_with_loss(
        self, inputs: tuple, labels: list[dict[str, Tensor]], num_objects: Tensor | Callable[[], Tensor] | None
    ) -> tuple[RfDetrOutput, StagePrediction, Tensor, dict[str, Tensor]]:
        base = self.forward_features(*inputs)
        stages = self.stages(base, (inputs[0].shape[-2], inputs[0].shape[-1]))
        loss, loss_dict = self.loss(stages, labels, num_objects)
        return base, stages[""], loss, loss_dict

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_objects: Tensor | Callable[[], Tensor] | None = None,
    ) -> RfDetrOutput:
        """Return logits, boxes and masks, and with labels the loss; with `return_dict=False` as a tuple.

        Args:
            pixel_values: (B, 3, height, width), normalized; each side a multiple of patch size x windows.
            pixel_mask: (B, height, width), 1 = image, 0 = padding. All ones is the same as None.
            labels: For each image a dictionary of `class_labels`, `boxes` and, for a segmentation model, `masks`; see
                [`rf_detr_loss`].
            output_attentions: Whether to return the attention weights, which uses eager attention.
            output_hidden_states: Whether to return the decoder's states.
            num_objects: Scalar; the losses are divided by it and by the number of groups. A micro-batch gets the number
                of the whole batch. By default it is counted in this batch, in training as the mean over all processes.
                A function that returns it is called when the predictions are computed.

        Returns:
            Outside training the logits of labels such as `__background__` are -1e4; see [`mask_background_logits`].
            Masks are those of the last layer; a training step returns none.

        Raises:
            ValueError: the size is not a multiple of patch size x windows, or a label cannot be trained on.
        """
        inputs = (pixel_values, drop_full_mask(pixel_mask), output_attentions, output_hidden_states)
        loss = loss_dict = None
        if labels is None:
            base = self.forward_features(*inputs)
            last = self.last_stage(base, (pixel_values.shape[-2], pixel_values.shape[-1]))
        else:
            base, last, loss, loss_dict = self._forward_with_loss(inputs, labels, num_objects)
        without_masks = last.masks is None or (self.training and labels is not None)
        return RfDetrOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=last.logits if self.training else self.mask_background_logits(last.logits),
            pred_boxes=last.boxes,
            pred_masks=None if without_masks else last.masks.logits(),
            **base,
        )


class RfDetrForInstanceSegmentation(RfDetrForObjectDetection):
    """RF-DETR with class, box and mask heads.

    Example:
        >>> import torch
        >>> from transformers_rfdetr import RfDetrConfig, RfDetrForInstanceSegmentation
        >>> model = RfDetrForInstanceSegmentation(RfDetrConfig.from_variant("rf-detr-seg-nano")).eval()
        >>> model(torch.zeros(1, 3, 312, 312)).pred_masks.shape
        torch.Size([1, 100, 78, 78])
    """

    def _add_modules(self, config: RfDetrConfig) -> None:
        super()._add_modules(config)
        self.segmentation_head = RfDetrSegmentationHead(config)

    def last_stage(self, base: RfDetrOutput, image_size: tuple[int, int]) -> StagePrediction:
        """Return the prediction of the last decoder layer, for an input of `image_size` (height, width)."""
        for pixels in self.segmentation_head.pixels(base.backbone_features, image_size):
            last = pixels  # the earlier ones are released
        masks = self.segmentation_head.factors(last, base.last_hidden_state)
        return super().last_stage(base, image_size)._replace(masks=masks)

    def stages(self, base: RfDetrOutput, image_size: tuple[int, int]) -> dict[str, StagePrediction]:
        """Return the prediction of each supervised stage; masks of the first stage use the pixels before all blocks."""
        head, hidden = self.segmentation_head, base.intermediate_hidden_states
        pixels = list(head.pixels(base.backbone_features, image_size))
        sources = {"": (pixels[-1], hidden[:, -1]), "_enc": (pixels[0], base.enc_hidden_states)}
        sources |= {f"_{layer}": (pixels[layer + 1], hidden[:, layer]) for layer in range(hidden.shape[1] - 1)}
        stages = super().stages(base, image_size)
        return {suffix: stage._replace(masks=head.factors(*sources[suffix])) for suffix, stage in stages.items()}
