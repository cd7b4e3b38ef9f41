"""Every family that the installed TransformerLens adapts, as a tiny random model in memory; or why there is none.

    for family in families():
        pair = build(family)            # the plain Hugging Face model, and the same weights as TransformerLens sees them

`SMALL` has a small value for every common setting, `OVERRIDES` what one family needs besides. Nothing here is loaded from
files or from the network.
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn

D_VOCAB, D_MODEL, N_LAYERS, N_HEADS, N_CTX, WINDOW = 320, 32, 3, 4, 64, 8
UNK, BOS, EOS, PAD = range(4)

# Given to every configuration that has a setting of the name. A window of 8 is shorter than the prompts of the checks.
SMALL: dict[str, Any] = dict(
    vocab_size=D_VOCAB,
    bos_token_id=BOS,
    eos_token_id=EOS,
    pad_token_id=PAD,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "attention_hidden_size", "lru_width"), D_MODEL),
    **dict.fromkeys(("out_hidden_size", "projection_dim", "word_embed_proj_dim"), D_MODEL),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth"), N_LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "attention_heads", "num_heads", "n_head", "n_heads"), N_HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), N_HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "v_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size", "intermediate_size_mlp"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "shared_intermediate_size"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "context_length", "max_seq_len"), N_CTX),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "local_attention"), WINDOW),
    attention_chunk_size=WINDOW,
    # mixtures of experts
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    moe_shared_expert_intermediate_size=32,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    # attention through small spaces
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 16),
    o_groups=2,
    # Sparse attention ranks keys by a sum of ReLUs over heads: of two heads it is often zero for several keys, and which of them are
    # kept then depends on pads, in the plain model too.
    index_n_heads=16,
    **dict.fromkeys(("index_head_dim", "index_topk"), 8),
    qk_rope_head_dim=4,
    query_pre_attn_scalar=8,
    # caps and scales that bend the logits of these weights
    **dict.fromkeys(("final_logit_softcapping", "logits_soft_cap"), 4.0),
    attn_logit_softcapping=5.0,
    logits_scaling=2.0,
    logit_scale=0.5,
    # state spaces and linear attention
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("mamba_n_heads", "n_mamba_heads", "mamba_num_heads", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    mamba_d_ssm=64,
    use_mamba_kernels=False,
    # towers for images and sound, which text never enters
    image_size=16,
    patch_size=8,
    num_channels=3,
    spatial_merge_size=1,
)

_HYBRID = dict(num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2)
_ALL_HEADS = dict(num_key_value_heads=N_HEADS)
_LAYERS_IN_TURN = dict(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1)
_ROTARY_3D = dict(text_config=dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2])))
_PER_LAYER = dict(num_hidden_layers=4, hidden_size_per_layer_input=8, vocab_size_per_layer_input=D_VOCAB)
_UNCAPPED = dict(final_logit_softcapping=None, attn_logit_softcapping=None)
_GEMMA3 = _UNCAPPED | dict(num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2)
_GEMMA4 = _PER_LAYER | dict(num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"] * 2)
_WIDE_VISION = dict(projector_input_dim=32, projector_output_dim=32, vision_output_dim=32)

# What a family needs besides SMALL, or in its place.
OVERRIDES: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": dict(num_hidden_layers=4, attn_layer_indices=[1, 3]),
    "CodeGenForCausalLM": dict(rotary_dim=4),
    "DeepseekV2ForCausalLM": _ALL_HEADS,
    "DeepseekV3ForCausalLM": _ALL_HEADS,
    "DeepseekV4ForCausalLM": dict(num_key_value_heads=1),
    "Emu3ForConditionalGeneration": dict(
        vocabulary_map={"<image>": 300}, vq_config=dict(hidden_size=32, base_channels=32, codebook_size=64)
    ),
    "FalconForCausalLM": dict(multi_query=True, new_decoder_architecture=False),
    "Florence2ForConditionalGeneration": dict(
        vision_config=dict(patch_size=[7, 3, 3, 3], num_heads=[1] * 4, num_groups=[1] * 4, embed_dim=[8] * 4)
    ),
    "GPTJForCausalLM": dict(rotary_dim=4, tie_word_embeddings=False),
    "GPTNeoForCausalLM": dict(num_layers=4, attention_types=[[["global", "local"], 2]]),
    "Gemma2ForCausalLM": dict(num_hidden_layers=4),
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": dict(text_config=_GEMMA3),
    "Gemma4ForCausalLM": _GEMMA4,
    "Gemma4ForConditionalGeneration": dict(text_config=_GEMMA4),
    "Gemma4UnifiedForConditionalGeneration": dict(text_config=_GEMMA4),
    "Glm4MoeLiteForCausalLM": _ALL_HEADS,
    "Glm4vForConditionalGeneration": _ROTARY_3D,
    "GlmMoeDsaForCausalLM": _ALL_HEADS,
    "GraniteMoeHybridForCausalLM": _HYBRID | dict(position_embedding_type="rope"),
    "JambaForCausalLM": _LAYERS_IN_TURN | dict(expert_layer_period=2, expert_layer_offset=1),
    "Lfm2ForCausalLM": dict(num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2),
    "Lfm2MoeForCausalLM": dict(num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2),
    "Llama4ForConditionalGeneration": dict(vision_config=_WIDE_VISION),
    "Mamba2ForCausalLM": dict(num_heads=8, head_dim=8),
    "NemotronHForCausalLM": dict(num_hidden_layers=4, layers_block_type=["linear_attention", "full_attention", "moe", "mlp"]),
    "OlmoHybridForCausalLM": _HYBRID,
    "PhiForCausalLM": _ALL_HEADS,
    "Qwen2_5_VLForConditionalGeneration": _ROTARY_3D,
    "Qwen3NextForCausalLM": _HYBRID,
    "Qwen3_5ForCausalLM": _HYBRID,
    "Qwen3_5ForConditionalGeneration": dict(text_config=_HYBRID),
    "Qwen3_5MoeForCausalLM": _HYBRID,
    "Qwen3_5MoeForConditionalGeneration": dict(text_config=_HYBRID),
    "YoutuForCausalLM": _ALL_HEADS,
    "Zamba2ForCausalLM": dict(num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2),
}

_NATIVE: dict[str, Any] = dict(
    d_model=D_MODEL, n_heads=N_HEADS, d_head=8, n_layers=N_LAYERS, n_ctx=N_CTX, d_vocab=D_VOCAB, device="cpu"
)
_ROTARY = dict(positional_embedding_type="rotary", rotary_dim=8)
_NATIVE_NAME = "TransformerLensNative"

# Families by another name than their class: settings that change what a lens or a patch meets.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "native, GPT-2's shape": (_NATIVE_NAME, dict(normalization_type="LN", act_fn="gelu", d_mlp=64)),
    "native, Llama's shape": (
        _NATIVE_NAME,
        dict(normalization_type="RMS", act_fn="silu", d_mlp=64, gated_mlp=True, n_key_value_heads=2, **_ROTARY),
    ),
    "native, attention only": (_NATIVE_NAME, dict(normalization_type="LN", attn_only=True)),
    "native, no norm": (_NATIVE_NAME, dict(normalization_type=None, attn_only=True)),
    "native, soft cap": (
        _NATIVE_NAME,
        dict(normalization_type="RMSPre", act_fn="relu", d_mlp=64, output_logits_soft_cap=4.0),
    ),
    "OPT, narrow embedding": ("OPTForCausalLM", dict(word_embed_proj_dim=16, do_layer_norm_before=False)),
    "Falcon, ALiBi": (
        "FalconForCausalLM",
        dict(alibi=True, multi_query=False, num_kv_heads=N_HEADS, parallel_attn=False),
    ),
    "Falcon, two norms": ("FalconForCausalLM", dict(new_decoder_architecture=True, multi_query=False)),
    "Gemma 3 with images, soft cap": (
        "Gemma3ForConditionalGeneration",
        dict(text_config=_GEMMA3 | dict(final_logit_softcapping=4.0)),
    ),
    "Granite 4, no positions": ("GraniteMoeHybridForCausalLM", _HYBRID),
    "GPT-NeoX, sequential": ("GPTNeoXForCausalLM", dict(use_parallel_residual=False)),
    "Qwen2, windows": ("Qwen2ForCausalLM", dict(use_sliding_window=True, max_window_layers=1)),
}


@dataclass(frozen=True)
class Family:
    """A row of the table: its name, the class of TransformerLens' registry, and its settings besides `SMALL`."""

    name: str
    architecture: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """The plain model, the same weights in TransformerLens, and the plain model's blocks."""

    family: Family
    reference: nn.Module
    model: Any
    blocks: nn.ModuleList


class Absent(Exception):
    """There is no decoder to test: why, in a few words, and the model where there is one that the library has to refuse."""

    def __init__(self, reason: str, model: Any = None):
        super().__init__(reason)
        self.model = model


@functools.cache
def families() -> tuple[Family, ...]:
    """All families of the installed TransformerLens, in the order of their names; variants after their class."""
    try:
        from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    except ImportError:  # TransformerLens 2: there are no adapters
        return ()
    listed = [Family(name, name, OVERRIDES.get(name, {})) for name in SUPPORTED_ARCHITECTURES if name != _NATIVE_NAME]
    listed += [Family(name, *variant) for name, variant in VARIANTS.items()]
    return tuple(sorted(listed, key=lambda family: (family.architecture.lower(), family.name != family.architecture)))


def build(family: Family, dtype: torch.dtype = torch.float32, *, compatibility: bool = False) -> Pair:
    """The plain model and the same weights in TransformerLens, the latter in compatibility mode if asked for.

    Raises:
        Absent: the family has no decoder over tokens here.
        Exception: whatever else stands in the way.
    """
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            reference, boot = _native(family) if family.architecture == _NATIVE_NAME else _hugging_face(family)
            randomise(reference)
            reference = reference.to(dtype).eval()
            model = boot(copy.deepcopy(reference), dtype)
        except ImportError as error:
            libraries = re.findall(r"(?:requires the|optional) (\w+) librar", str(error))
            raise Absent(f"needs {libraries[-1] if libraries else error}") from error  # the last is the rarest
        if compatibility:
            model.enable_compatibility_mode(disable_warnings=True)
        mapping = getattr(model.adapter, "component_mapping", None) or {}
        if "blocks" not in mapping:
            parts = ", ".join(name for name in mapping if "blocks" in name)
            raise Absent(f"no blocks, but {parts or 'other parts'}", model)
        return Pair(family, reference, model.eval(), reference.get_submodule(mapping["blocks"].name))


def _hugging_face(family: Family) -> tuple[nn.Module, Any]:
    from transformer_lens.model_bridge import TransformerBridge

    # The registry has names of remote code as well, which differ in their capitals.
    name = {name.lower(): name for name in dir(transformers)}.get(family.architecture.lower())
    if name is None:
        raise Absent("not in transformers (remote code)")
    if name != family.architecture and any(other.architecture == name for other in families()):
        raise Absent(f"the same as {name}")
    model_class = getattr(transformers, name)
    if "input_ids" not in inspect.signature(model_class.forward).parameters:
        raise Absent("reads no tokens")
    config = small_config(model_class.config_class, family.settings)
    reference = model_class._from_config(config, attn_implementation="eager").float()
    reference.config.architectures = [family.architecture]
    if not reference.config.is_encoder_decoder:
        _check_causal(reference.eval())

    def boot(hf_model: nn.Module, dtype: torch.dtype) -> Any:
        return TransformerBridge.boot_transformers(
            f"tiny-{family.architecture}", hf_model=hf_model, tokenizer=tokenizer(), device="cpu", dtype=dtype
        )

    return reference, boot


def _check_causal(reference: nn.Module) -> None:
    tokens = torch.arange(4, 12)[None]
    with torch.no_grad():
        logits = getattr(reference(input_ids=tokens, use_cache=False), "logits", None)
        if not isinstance(logits, Tensor):
            raise Absent("no logits")
        changed = reference(input_ids=tokens.where(tokens < 11, 4), use_cache=False).logits
    # Kernels that take tokens together (experts) round otherwise when one of them is another.
    if (logits[:, 0] - changed[:, 0]).abs().max() > 1e-4 * logits.abs().max():
        raise Absent("attends in both directions")


def small_config(config_class: Any, settings: dict[str, Any]) -> Any:
    """A configuration of `SMALL` and the settings, and of small parts where it has parts (text, vision, sound)."""
    settings = dict(settings)
    names = (
        {field.name for field in dataclasses.fields(config_class)}
        if dataclasses.is_dataclass(config_class)
        else set(inspect.signature(config_class.__init__).parameters)
    )
    chosen = {name: value for name, value in SMALL.items() if name in names}
    for part, part_class in (getattr(config_class, "sub_configs", None) or {}).items():
        part_settings = settings.pop(part, {})
        if part_class is transformers.AutoConfig:
            part_class = type(getattr(config_class(), part, None))
        if part_class is not type(None):
            chosen[part] = small_config(part_class, part_settings)
    return config_class(**(chosen | settings))


def _native(family: Family) -> tuple[nn.Module, Any]:
    try:
        from transformer_lens.config import TransformerBridgeConfig
        from transformer_lens.model_bridge.sources import build_bridge_from_module
        from transformer_lens.model_bridge.sources.native import NativeModel
    except ImportError as error:
        raise Absent("this TransformerLens has none") from error

    config = TransformerBridgeConfig(**_NATIVE, **family.settings)

    def boot(module: nn.Module, dtype: torch.dtype) -> Any:
        return build_bridge_from_module(
            module, architecture=_NATIVE_NAME, tl_config=config, tokenizer=tokenizer(), dtype=dtype, device="cpu"
        )

    return NativeModel(config), boot


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Make every parameter matter: matrices of order 1/sqrt(fan in), biases of 0.3, gains moved by 0.3."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() <= 1:
                parameter.add_(0.3 * noise)  # from 1, or from 0 where the model multiplies by 1 + gain
            elif any(part in name for part in ("emb", "wte", "wpe")):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1.2 * noise / parameter.shape[-1] ** 0.5)


def tokenizer() -> Any:
    """A word-level tokenizer of 320 tokens, with <unk>, <s>, </s> and <pad> at ids 0 to 3; a new object every time."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<unk>", "<s>", "</s>", "<pad>"]
    words = special + [f"w{i}" for i in range(len(special), D_VOCAB)]
    level = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    settings: dict[str, Any] = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), special, strict=True))
    # With `add_bos_token` TransformerLens takes it as it is; without, it looks for its files.
    settings |= dict(model_max_length=N_CTX, name_or_path="tiny", add_bos_token=True)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=level, **settings)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Loading prints, logs and warns; none of it is about us. And nothing is installed.

    TransformerLens runs `pip install torchvision` by itself when it boots a multimodal model whose processor does not load,
    which may replace torch with it: it gets an error instead, which it takes for "not installed".
    """
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            mock.patch("subprocess.check_call", side_effect=OSError("nothing is installed while models load")),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
