"""The sections of a run's TOML file, each a frozen pydantic model that checks itself. Imports no jax."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction01 = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A table of the TOML file: unknown keys are errors, and nothing changes after reading."""

    # Deferred: the whole config's validator is built once, when a file is read, and not each section's before it.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=True, defer_build=True)


class RunSection(Section):
    name: str = Field("run", min_length=1, description="names the run directory runs/NAME and the plots")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of public things: the initial weights")

    @model_validator(mode="after")
    def _one_path_component(self):
        if self.name in (".", "..") or any(c in self.name for c in "/\\\0\n"):
            raise ValueError(
                f"run.name={self.name!r} is a path: give one name without slashes, and --run-dir for a place"
            )
        return self


class DataSection(Section):
    train: str = Field("", description='"mnist5k/train", "digits/train", or a path: docs/data.md lists the formats')
    validation: str | None = Field(None, description="held-out examples, in the same forms as data.train")
    validation_is: Literal["public", "private"] | None = Field(
        None,
        description="whether held-out metrics may be shared; must be said where data.validation is given",
    )
    format: Literal["auto", "arrays", "array_record", "image_folder", "parquet", "cifar", "tokens", "tsv"] = Field(
        "auto", description='what data.train is; "auto": seen from the path'
    )
    features_key: str = Field("features", description="name of the features' array or column")
    labels_key: str = Field("labels", description="name of the labels' array or column")
    user_key: str | None = Field(
        None, description='name of the array of user ids, for privacy.unit = "user"; needs an .npz file or folder'
    )
    num_classes: PositiveInt | None = Field(
        None, description="number of classes; a constant that you know, never counted from private labels"
    )
    image_size: PositiveInt | None = Field(
        None, description="images reach the model with this many pixels on each side"
    )
    image_resize: PositiveInt | None = Field(
        None, description="shorter side before the centre crop to image_size, when decoding; default image_size"
    )
    sequence_length: PositiveInt | None = Field(None, description="tokens of one example; longer texts are cut")
    vocabulary_size: PositiveInt | None = Field(None, description="token ids lie below; a public constant")
    token_dtype: Literal["uint16", "uint32"] = Field("uint16", description="of a memory-mapped token file")
    tokenizer: str = Field("bytes", description='"bytes", or the path of a Hugging Face tokenizer.json')
    on_corrupt: Literal["error", "replace"] = Field(
        "error", description='an unreadable example: "replace" keeps its index and lets it contribute nothing'
    )
    residence: Literal["host", "device"] = Field(
        "host", description='"device" keeps the whole data set in device memory'
    )
    num_threads: PositiveInt = Field(4, description="threads that read and assemble batches")
    mean: list[float] | None = Field(None, description="subtracted after scaling to [0, 1]; a public constant")
    std: list[Positive] | None = Field(None, description="divides after subtracting data.mean; a public constant")
    random_flip: bool = Field(False, description="mirror images left-right with probability 1/2")
    random_crop_padding: int = Field(0, ge=0, description="pad by this many pixels and crop back at a random place")
    augmentation_multiplicity: PositiveInt = Field(
        1, description="views of each example; their gradients are averaged before the clip"
    )

    @model_validator(mode="after")
    def _held_out(self):
        if self.validation and self.validation_is is None:
            raise ValueError(
                "data.validation is given but data.validation_is is not: the guarantee covers training records only, "
                'so say validation_is = "public" (metrics may be shared) or "private" (they stay sensitive)'
            )
        if self.image_resize is not None and self.image_resize < (self.image_size or 1):
            raise ValueError(
                f"data.image_resize={self.image_resize} is below data.image_size={self.image_size}: the crop would not "
                "fit into the resized image"
            )
        if self.augmentation_multiplicity > 1 and not (self.random_flip or self.random_crop_padding):
            raise ValueError(
                f"data.augmentation_multiplicity={self.augmentation_multiplicity} without augmentation costs as many "
                "passes over equal views: set data.random_flip or data.random_crop_padding, or leave it out"
            )
        return self


class ModelSection(BaseModel):
    """`name` chooses the model; every other key goes to it and is checked against its own options."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field("cnn", description="mlp, cnn, vit_b16, .. (other keys are the model's own): docs/models.md")
    pretrained: str | None = Field(None, description="file or directory of initial weights; they count as public")
    pretrained_format: Literal["auto", "hugging_face", "timm", "augreg", "bit", "objax", "dpscale", "orbax"] = Field(
        "auto", description='what model.pretrained is; "auto": told by the names of its tensors'
    )
    trainable: list[str] | None = Field(
        None, description='what is trained: "all", "head", "bias", "last:N", "lora", patterns of names; default all'
    )
    lora_rank: int = Field(0, ge=0, description="low-rank adapters of this rank are trained; 0: none")
    lora_alpha: Positive = Field(16.0, description="adapters are scaled by lora_alpha / lora_rank")
    lora_targets: list[str] = Field(["*/query", "*/value"], description="dense layers that get adapters")

    @field_validator("trainable", "lora_targets", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """The model's own keys."""
        return dict(self.model_extra or {})


class OptimizerSection(Section):
    name: Literal["sgd", "adam", "adamw", "lamb"] = Field("sgd", description="the optax optimizer")
    learning_rate: Positive = Field(0.1, description="peak learning rate")
    momentum: Fraction01 | None = Field(None, description="sgd only")
    nesterov: bool | None = Field(None, description="sgd only")
    beta1: Fraction01 | None = Field(None, description="adam, adamw, lamb; default 0.9")
    beta2: Fraction01 | None = Field(None, description="adam, adamw, lamb; default 0.999")
    eps: Positive | None = Field(None, description="adam, adamw: 1e-8; lamb: 1e-6")
    weight_decay: NonNegative | None = Field(None, description="adamw, lamb: decoupled from the clipped gradient")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="from the peak down to final_fraction of it when all steps are done"
    )
    warmup_steps: int = Field(
        0, ge=0, description="steps of linear warm-up: step t takes (t + 1) / warmup_steps of the peak"
    )
    final_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="fraction of the peak that is reached when all steps are done (cosine, linear)"
    )

    @model_validator(mode="after")
    def _options_belong_to_the_optimizer(self):
        owners = {
            "momentum": ("sgd",),
            "nesterov": ("sgd",),
            "beta1": ("adam", "adamw", "lamb"),
            "beta2": ("adam", "adamw", "lamb"),
            "eps": ("adam", "adamw", "lamb"),
            "weight_decay": ("adamw", "lamb"),
        }
        for option, names in owners.items():
            if getattr(self, option) is not None and self.name not in names:
                raise ValueError(
                    f"optimizer.{option} is given but optimizer.name={self.name!r} has no such option: it belongs to "
                    f"{', '.join(names)}"
                )
        return self


class TrainingSection(Section):
    steps: PositiveInt | None = Field(None, description="logical steps; or give epochs")
    epochs: Positive | None = Field(None, description="steps = ceil(epochs / sampling rate)")
    evaluate_every_steps: int = Field(0, ge=0, description="held-out evaluation; 0: at the end only")
    label_smoothing: Fraction01 = Field(0.0, description="in the classification loss")
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="keep an exponential moving average of the parameters; step t takes min(this, (1 + t) / (10 + t))",
    )
    evaluate_ema: bool = Field(False, description="evaluate and release the average instead of the last parameters")

    @model_validator(mode="after")
    def _one_length(self):
        if (self.steps is None) == (self.epochs is None):
            seen = "neither is" if self.steps is None else "both are"
            raise ValueError(f"training.steps or training.epochs: {seen} given; give exactly one")
        return self

    @model_validator(mode="after")
    def _an_average_to_evaluate(self):
        if self.evaluate_ema and self.ema_decay is None:
            raise ValueError("training.evaluate_ema is true but training.ema_decay is not given: say how it decays")
        return self


class PrivacySection(Section):
    enabled: bool = Field(True, description="false: the same loop without clipping and noise, for comparison")
    epsilon: Positive | None = Field(None, description="allowed at the planned end; the noise is calibrated to it")
    noise_multiplier: NonNegative | None = Field(None, description="noise std / sensitivity; instead of epsilon")
    delta: Annotated[float, Field(gt=0, lt=1)] | None = Field(None, description="required when enabled")
    clip_norm: Positive = Field(
        1.0, description="bound on each example's gradient norm (with per_group: clip_groups say it)"
    )
    bound: Literal["flat", "normalized", "per_group"] = Field(
        "flat",
        description='"normalized" scales every gradient to nearly clip_norm, short ones too (automatic clipping); '
        '"per_group" clips each group of clip_groups on its own',
    )
    clip_groups: dict[str, Positive] | None = Field(
        None,
        description='per_group: a norm for each pattern of parameter names, {"Conv_*" = 0.3, "*" = 0.4}; the first '
        "that matches a parameter's path counts, and the whole gradient is bounded by sqrt(sum of squares)",
    )
    expected_batch_size: Positive | None = Field(
        None, description="expected logical batch: q = this / number of examples; also the public divisor"
    )
    sampling_rate: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="q, instead of expected_batch_size"
    )
    max_batch_size: PositiveInt | None = Field(
        None,
        description="truncated Poisson sampling: larger draws are cut to a uniform subset, and accounted so",
    )
    constant_time: bool = Field(
        False,
        description="every step takes the same number of accumulations, so that its time does not tell the size of "
        "the draw; needs max_batch_size",
    )
    replay_reserve: int = Field(
        0,
        ge=0,
        description="steps beyond the planned ones that the noise is calibrated for: so many may be charged on top "
        "(after a bad checkpoint or a changed program) before an allowed epsilon ends the run early",
    )
    unit: str = Field(
        "example",
        min_length=1,
        description='what one record is: printed with every guarantee. "user": users are sampled and clipped, each '
        "with all its records; other words only name the record",
    )
    max_examples_per_user: PositiveInt | None = Field(
        None, description='for unit = "user": of more records than this, a random subset is used'
    )
    neighboring_relation: Literal["zero_out", "add_or_remove", "replace_one"] = Field(
        "zero_out", description="which data sets are neighbours; zero_out keeps the number of examples public"
    )
    accountant: Literal["pld", "rdp"] = Field("pld", description="pld is tighter; rdp is faster")
    public_data_used: Annotated[str, Field(min_length=1)] | None = Field(
        None, description='for the card of a release: public data that entered (pre-training, ..), or "none"'
    )
    hyperparameter_search: Literal["none", "public", "private"] | None = Field(
        None, description="for the card: on which data these settings were chosen; epsilon covers no private search"
    )
    verify: bool = Field(
        True, description="check clip, noise and agreement on made-up rows before the first step, partly on restart"
    )
    insecure_seed: int | None = Field(
        None, description="tests and benchmarks only: a fixed secret, hence NO privacy guarantee"
    )

    @model_validator(mode="after")
    def _groups_belong_to_per_group(self):
        if (self.bound == "per_group") != bool(self.clip_groups):
            raise ValueError(
                f"privacy.bound={self.bound!r} with privacy.clip_groups={self.clip_groups}: the norms of groups go "
                'with bound = "per_group", and it needs them; give both or neither'
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_say_it(self):
        if (self.expected_batch_size is None) == (self.sampling_rate is None):
            seen = "neither is" if self.sampling_rate is None else "both are"
            raise ValueError(f"privacy.expected_batch_size or privacy.sampling_rate: {seen} given; give exactly one")
        if not self.enabled:
            return self
        if (self.epsilon is None) == (self.noise_multiplier is None):
            seen = "neither is" if self.epsilon is None else "both are"
            raise ValueError(f"privacy.epsilon or privacy.noise_multiplier: {seen} given; give exactly one")
        if self.replay_reserve and self.epsilon is None:
            raise ValueError(
                f"privacy.replay_reserve={self.replay_reserve} is given but privacy.epsilon is not: the reserve is "
                "room within an allowed epsilon, and with privacy.noise_multiplier nothing ends the run. Give "
                "privacy.epsilon"
            )
        if self.delta is None:
            raise ValueError(
                "privacy.delta is missing: an epsilon means nothing without it; below 1 / number of examples is usual"
            )
        return self


class PerformanceSection(Section):
    """Nothing here changes an index, a noise bit or epsilon."""

    physical_batch_size: PositiveInt | Literal["auto"] = Field(
        64, description='examples per device in one accumulation; "auto": the largest that fits'
    )
    clipping_method: Literal["auto", "bookkeeping", "ghost", "materialize"] = Field(
        "auto", description="how per-example gradients are clipped; the result is the same"
    )
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the model's forward and backward pass; norms, sums and noise stay float32"
    )
    update_sharding: Literal["replicated", "sharded"] = Field(
        "replicated",
        description='"sharded": noise and optimizer state are cut over the devices, for 1/devices of their time and '
        "memory each; the result is the same",
    )
    reduce_every_accumulation: bool = Field(
        False,
        description="reduce after every physical batch, as ordinary data-parallel SGD does, instead of once a step: "
        "to compare with; the result is the same",
    )
    deterministic: bool = Field(False, description="bit-equal reruns on a GPU, at a price")
    compilation_cache: str | None = Field(None, description="folder of jax's persistent compilation cache")

    @model_validator(mode="after")
    def _one_way_to_reduce(self):
        if self.reduce_every_accumulation and self.update_sharding == "sharded":
            raise ValueError(
                "performance.reduce_every_accumulation is true and performance.update_sharding is sharded: the sums "
                "would be reduced whole and cut afterwards; choose one of them"
            )
        return self


class CheckpointSection(Section):
    every_steps: PositiveInt | None = Field(None, description="save each time this many steps have passed")
    every_s: Positive | None = Field(300.0, description="save when this many seconds have passed")
    keep: PositiveInt = Field(2, description="good checkpoints that stay on disk")


class MetricsSection(Section):
    sensitive: bool = Field(
        False, description="also write training loss, gradient norms, realised batch sizes (mode 0600)"
    )
    group_norms: bool = Field(
        False,
        description="with sensitive: also the mean gradient norm of each of privacy.clip_groups, or without them of "
        "each module",
    )
    tensorboard: bool = Field(False, description="also write the public stream for TensorBoard")

    @model_validator(mode="after")
    def _norms_are_sensitive(self):
        if self.group_norms and not self.sensitive:
            raise ValueError(
                "metrics.group_norms is true but metrics.sensitive is not: norms of single examples' gradients are not "
                "protected by noise and go to the sensitive stream alone; set metrics.sensitive = true too, or leave "
                "it out"
            )
        return self
