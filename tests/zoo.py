"""Tiny random models of every tested architecture, on every surface that the installed TransformerLens offers.

    model = zoo.build("llama", "bridge")            # cached: tests share it and must leave it as it was
    logits = zoo.reference("llama")(tokens).logits  # the same weights in plain transformers
    @pytest.mark.parametrize("arch,kind", zoo.cases())

No network, no files. Every parameter is random: norm gains differ from 1 and biases from 0, so what drops one of them shows.
"""

import atexit
import contextlib
import copy
import functools
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
from torch import Tensor

TL_VERSION = tuple(int(part) for part in version("transformer-lens").split(".")[:2])
HAS_HT, HAS_BRIDGE = TL_VERSION < (4, 0), TL_VERSION >= (3, 9)

D_VOCAB, D_MODEL, N_LAYERS, N_HEADS, N_CTX = 320, 32, 3, 4, 64
UNK, BOS, EOS, PAD = range(4)

# raw bridge; the bridge with old names but raw weights; with folded and centred weights; HookedTransformer without and
# with the weight processing that `from_pretrained` does by default.
_ALL_KINDS = ("bridge", "compat", "processed", "ht", "ht-default")
KINDS = tuple(kind for kind in _ALL_KINDS if (HAS_HT if kind.startswith("ht") else HAS_BRIDGE))
RAW_KINDS = tuple(kind for kind in KINDS if kind in ("bridge", "compat", "ht"))
# A raw and a processed surface: what a test takes that need not see all of them.
FEW_KINDS = ("bridge", "processed") if HAS_BRIDGE else ("ht", "ht-default")


# --- what cannot be built: (arch, kinds, TransformerLens versions from, below, why)
_IMPOSSIBLE: list[tuple[str, tuple[str, ...], tuple[int, int], tuple[int, int], str]] = [
    (
        "phi",
        ("ht", "ht-default"),
        (3, 0),
        (4, 0),
        "HookedTransformer 3.x reads partial_rotary_factor, which transformers 5 moved into rope_parameters",
    )
]


def _gpt2() -> Any:
    # n_ctx is what HookedTransformer reads; GPT2Config does not write it by itself.
    return transformers.GPT2Config(**VOCABULARY, n_positions=N_CTX, n_ctx=N_CTX, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS)


def _neox() -> Any:
    return transformers.GPTNeoXConfig(**WIDE, rotary_pct=0.25, use_parallel_residual=True)


def _gptneo() -> Any:
    return transformers.GPTNeoConfig(
        **VOCABULARY,
        hidden_size=D_MODEL,
        num_layers=4,
        num_heads=N_HEADS,
        attention_types=[[["global", "local"], 2]],
        max_position_embeddings=N_CTX,
        window_size=8,
    )


def _gptj() -> Any:
    return transformers.GPTJConfig(
        **VOCABULARY, n_positions=N_CTX, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS, rotary_dim=4, tie_word_embeddings=False
    )


def _opt() -> Any:
    return transformers.OPTConfig(
        **VOCABULARY,
        hidden_size=D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        ffn_dim=64,
        max_position_embeddings=N_CTX,
        word_embed_proj_dim=D_MODEL,
    )


def _bloom() -> Any:
    return transformers.BloomConfig(**VOCABULARY, hidden_size=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS)


def _gemma2() -> Any:
    # Logits of these weights have a standard deviation near 3: a cap of 4 bends them, one of 30 would not.
    return transformers.Gemma2Config(
        **_GEMMA, query_pre_attn_scalar=8, final_logit_softcapping=4.0, attn_logit_softcapping=5.0, sliding_window=16
    )


VOCABULARY: dict[str, Any] = dict(vocab_size=D_VOCAB, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
WIDE: dict[str, Any] = VOCABULARY | dict(
    hidden_size=D_MODEL,
    num_hidden_layers=N_LAYERS,
    num_attention_heads=N_HEADS,
    intermediate_size=64,
    max_position_embeddings=N_CTX,
)
_LLAMA: dict[str, Any] = WIDE | dict(num_key_value_heads=2, tie_word_embeddings=False)
_GEMMA: dict[str, Any] = _LLAMA | dict(tie_word_embeddings=True, num_hidden_layers=4, head_dim=8)

CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": _gpt2,
    "neox": _neox,
    "gptneo": _gptneo,
    "llama": lambda: transformers.LlamaConfig(**_LLAMA),
    "qwen3": lambda: transformers.Qwen3Config(**_LLAMA, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**_LLAMA, sliding_window=None),
    "gemma2": _gemma2,
    "gptj": _gptj,
    "opt": _opt,
    "bloom": _bloom,
    "phi": lambda: transformers.PhiConfig(**WIDE, partial_rotary_factor=0.5),
    "qwen2": lambda: transformers.Qwen2Config(**_LLAMA),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_GEMMA, query_pre_attn_scalar=8, sliding_window=16),
}
ARCHS = tuple(CONFIGS)


def unavailable(arch: str, kind: str) -> str | None:
    """Why the installed version cannot build this case, or None where it can."""
    if arch not in ARCHS or kind not in _ALL_KINDS:
        raise ValueError(f"expected an architecture of {ARCHS} and a kind of {_ALL_KINDS}, got {arch!r}, {kind!r}")
    if kind not in KINDS:
        return f"TransformerLens {version('transformer-lens')} has no {'HookedTransformer' if 'ht' in kind else 'bridge'}"
    for bad_arch, kinds, first, below, why in _IMPOSSIBLE:
        if arch == bad_arch and kind in kinds and first <= TL_VERSION < below:
            return why
    return None


def available(arch: str, kind: str) -> bool:
    """Whether the installed version can build this case."""
    return unavailable(arch, kind) is None


def cases(archs: Sequence[str] = ARCHS, kinds: Sequence[str] = KINDS) -> list[Any]:
    """Parameters (arch, kind) of everything that the installed version can build."""
    return [pytest.param(arch, kind, id=f"{arch}-{kind}") for arch in archs for kind in kinds if available(arch, kind)]


# --- models


@functools.cache
def reference(arch: str, dtype: torch.dtype = torch.float32) -> Any:
    """The plain transformers model. Never given to a bridge, which would rewrite it in place."""
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(0)
        config = CONFIGS[arch]()
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model.config.architectures = [type(model).__name__]
    _randomise(model)
    return model.to(dtype).eval()


@functools.cache
def build(arch: str, kind: str = FEW_KINDS[0], dtype: torch.dtype = torch.float32) -> Any:
    """The tiny model of an architecture on one surface, with `tokenizer()`; the same object on every call.

    Raises:
        ValueError: the installed version cannot build it (the message says why).
    """
    why = unavailable(arch, kind)
    if why is not None:
        raise ValueError(f"{arch} cannot be built as {kind}: {why}")
    hf_model = copy.deepcopy(reference(arch, dtype))
    with torch.random.fork_rng(devices=[]), _quiet():
        if kind.startswith("ht"):
            return _hooked(hf_model, processed=kind == "ht-default", dtype=dtype)
        from transformer_lens.model_bridge import TransformerBridge

        bridge = TransformerBridge.boot_transformers(
            f"tiny-{arch}", hf_model=hf_model, tokenizer=tokenizer(), device="cpu", dtype=dtype
        )
        if kind != "bridge":
            bridge.enable_compatibility_mode(no_processing=kind == "compat", disable_warnings=True)
        return bridge.eval()


def boot(config: Any, dtype: torch.dtype = torch.float32, *, family: str = "AutoModelForCausalLM") -> tuple[Any, Any]:
    """A bridge of a random model of any config, and the plain transformers model with the same weights.

    Skips the test where the installed versions have no bridge or no adapter for it.
    """
    if not HAS_BRIDGE:
        pytest.skip(f"TransformerLens {version('transformer-lens')} has no bridge")
    from transformer_lens.model_bridge import TransformerBridge

    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(0)
        plain = getattr(transformers, family).from_config(config, attn_implementation="eager")
        plain.config.architectures = [type(plain).__name__]
        _randomise(plain)
        plain = plain.to(dtype).eval()
        try:
            bridge = TransformerBridge.boot_transformers(
                "tiny", hf_model=copy.deepcopy(plain), tokenizer=tokenizer(), device="cpu", dtype=dtype
            )
        except ValueError as error:
            pytest.skip(f"no adapter: {error}")
    return bridge.eval(), plain


def copied(model: Any) -> Any:
    """A copy. Attention of a bridge keeps the pattern of its last pass, which can be copied after one without gradients."""
    with torch.no_grad():
        model(tokens(1, 4))
    return copy.deepcopy(model)


def tokens(batch: int = 2, pos: int = 12, *, seed: int = 1) -> Tensor:
    """Random token ids [batch, pos], special tokens left out."""
    return torch.randint(PAD + 1, D_VOCAB, (batch, pos), generator=torch.Generator().manual_seed(seed))


def readout(model: Any, resid: Tensor) -> Tensor:
    """Logits of a final residual by the model's own modules: what tests compare the library with."""
    x = model.unembed(model.ln_final(resid) if hasattr(model, "ln_final") else resid)
    transform = getattr(getattr(model, "adapter", None), "apply_output_logits_transform", None)
    if callable(transform):
        return transform(x)
    cap = getattr(model.cfg, "output_logits_soft_cap", None) or 0.0
    return cap * torch.tanh(x / cap) if cap > 0 else x


def _randomise(model: Any, seed: int = 0) -> None:
    """Make every parameter matter: weights of order 1/sqrt(fan in), biases of 0.3, norm gains of 1 +- 0.3."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 and "bias" not in name:
                # Gemma multiplies by 1 + gain.
                parameter.copy_(0.3 * noise + (0.0 if "Gemma" in type(model).__name__ else 1.0))
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * noise)
            elif any(part in name for part in ("emb", "wte", "wpe")):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1.2 * noise / parameter.shape[-1] ** 0.5)


def _hooked(hf_model: Any, *, processed: bool, dtype: torch.dtype) -> Any:
    """HookedTransformer from a transformers model; its own `from_pretrained` would ask the hub for a config."""
    import transformer_lens.loading_from_pretrained as loading
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    hf_config = hf_model.config
    architecture = hf_config.architectures[0]
    with tempfile.TemporaryDirectory(prefix="tiny_") as folder:
        hf_config.save_pretrained(folder)
        if architecture.startswith("Gemma"):
            config = _gemma_config(hf_config, architecture)
        else:
            config = loading.convert_hf_model_config(folder)
        config.update(
            model_name="tiny",
            tokenizer_name=None,
            init_weights=False,
            device="cpu",
            dtype=dtype,
            default_prepend_bos=True,
            from_checkpoint=False,
            n_devices=1,
        )
        if processed:
            config["normalization_type"] = {"LN": "LNPre", "RMS": "RMSPre"}[config["normalization_type"]]
        config = HookedTransformerConfig.from_dict(config)
        state = loading.get_pretrained_state_dict(folder, config, hf_model, dtype=dtype)
    model = HookedTransformer(config, tokenizer(), move_to_device=False)
    model.load_and_process_state_dict(
        state,
        fold_ln=processed,
        center_writing_weights=processed,
        # Under a soft cap a shift of the logits is not harmless; `from_pretrained` leaves it out too.
        center_unembed=processed and not getattr(hf_config, "final_logit_softcapping", None),
        fold_value_biases=processed,
    )
    return model.eval()


def _gemma_config(config: Any, architecture: str) -> dict[str, Any]:
    """HookedTransformer knows Gemma by the names of released models only: its settings, from the config."""
    settings: dict[str, Any] = dict(
        d_model=config.hidden_size,
        d_head=config.head_dim,
        n_heads=config.num_attention_heads,
        d_mlp=config.intermediate_size,
        n_layers=config.num_hidden_layers,
        n_ctx=config.max_position_embeddings,
        eps=config.rms_norm_eps,
        d_vocab=config.vocab_size,
        act_fn="gelu_pytorch_tanh",
        normalization_type="RMS",
        rotary_base=10000,
        rotary_dim=config.head_dim,
        positional_embedding_type="rotary",
        use_attn_scale=True,
        attn_scale=config.query_pre_attn_scalar**0.5,
        n_key_value_heads=config.num_key_value_heads,
        window_size=config.sliding_window,
        use_local_attn=True,
        gated_mlp=True,
        final_rms=True,
        use_normalization_before_and_after=True,
        original_architecture=architecture,
        attn_types=["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
    )
    if architecture.startswith("Gemma2"):
        settings |= dict(attn_scores_soft_cap=config.attn_logit_softcapping, output_logits_soft_cap=config.final_logit_softcapping)
    else:
        settings |= dict(use_qk_norm=True, rotary_base=1_000_000, rotary_base_local=10_000)
    return settings


# --- the model whose truth is known

AFFINE_KINDS = (("ht",) if HAS_HT else ()) + (("bridge",) if HAS_BRIDGE else ())


@functools.cache
def affine_model(kind: str = AFFINE_KINDS[-1], dtype: torch.dtype = torch.float32) -> Any:
    """A model whose blocks are exactly affine in the residual on sequences of *one* token.

    Attention only and no normalisation: over one token the attention pattern is exactly 1, so a block is
    `x + sum_h (x W_V + b_V) W_O + b_O`. Biases are random (TransformerLens starts them at 0, and a zero bias cannot show
    that one was dropped) and the vocabulary is larger than the width, so that residuals span the space.

    Args:
        kind: "ht" (HookedTransformer) or "bridge" (TransformerLens' own model under a bridge), see `AFFINE_KINDS`.
        dtype: type of the weights; float64 for round-off tests.

    Raises:
        ValueError: the installed version has no such surface.
    """
    if kind not in AFFINE_KINDS:
        raise ValueError(f"expected a kind of {AFFINE_KINDS} on this TransformerLens, got {kind!r}")
    settings: dict[str, Any] = dict(
        d_model=16,
        n_heads=2,
        d_head=8,
        n_layers=3,
        n_ctx=N_CTX,
        d_vocab=D_VOCAB,
        attn_only=True,
        normalization_type=None,
        seed=0,
        device="cpu",
        dtype=dtype,
    )
    with torch.random.fork_rng(devices=[]), _quiet():
        if kind == "ht":
            from transformer_lens import HookedTransformer, HookedTransformerConfig

            model = HookedTransformer(HookedTransformerConfig(**settings), tokenizer())
        else:
            from transformer_lens.config import TransformerBridgeConfig
            from transformer_lens.model_bridge import TransformerBridge

            model = TransformerBridge.boot_native(TransformerBridgeConfig(**settings), tokenizer=tokenizer(), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            embeds = parameter.dim() == 2 and N_CTX in parameter.shape or D_VOCAB in parameter.shape
            # 0.7 / sqrt(d) in W_V and W_O: the maps are far from the identity and well conditioned.
            bias = parameter.dim() == 1 or ".b_" in name or name.endswith("bias")
            parameter.copy_(noise * (0.5 if bias else 1.0 if embeds else 0.7 * 16**-0.5))
    return model.eval()


def truth(model: Any) -> dict[int, tuple[Tensor, Tensor]]:
    """The exact maps of `affine_model`: layer l -> (W [d, d], b [d]) with final residual = W x + b, in float64."""
    n_layers, d = model.cfg.n_layers, model.cfg.d_model
    w_v, w_o, b_v, b_o = (getattr(model, name).detach().double() for name in ("W_V", "W_O", "b_V", "b_O"))
    weight, bias = torch.eye(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    maps = {n_layers: (weight, bias)}
    for layer in reversed(range(n_layers)):
        block = torch.eye(d, dtype=torch.float64) + torch.einsum("hik,hko->oi", w_v[layer], w_o[layer])
        shift = torch.einsum("hk,hko->o", b_v[layer].view(w_v.shape[1], -1), w_o[layer]) + b_o[layer]
        weight, bias = weight @ block, weight @ shift + bias
        maps[layer] = (weight, bias)
    return dict(sorted(maps.items()))


def exact_maps(model: Any) -> Any:
    """The truth of `affine_model` as translators, in its own dtype."""
    import tl_lenses as tll

    n, maps = model.cfg.n_layers, truth(model)
    weights, biases = (torch.stack([maps[layer][i] for layer in range(n)]).to(model.W_U.dtype) for i in (0, 1))
    return tll.Translators([(tll.site(model, layer), tll.site(model, n)) for layer in range(n)], weights, biases, n_layers=n)


# --- what hangs on a model


def random_maps(model: Any, /, seed: int = 0, scale: float = 0.3, **meta: Any) -> Any:
    """Translators of every layer of a model: the identity and noise of this scale, with random biases."""
    import tl_lenses as tll

    n, d = model.cfg.n_layers, model.cfg.d_model
    g = torch.Generator().manual_seed(seed)
    rows = [(tll.site(model, i), tll.site(model, n)) for i in range(n)]
    weights = torch.eye(d) + scale * torch.randn(n, d, d, generator=g) / d**0.5
    return tll.Translators(rows, weights, torch.randn(n, d, generator=g), n_layers=n, meta=meta)


def n_hooks(model: Any) -> int:
    """How many hooks are on a model."""
    return sum(len(point._forward_hooks) for point in {id(point): point for point in model.hook_dict.values()}.values())


# --- the tokenizer

_TOKENIZER_TEXT = (
    "the cat sat on the mat. the dog ran to the cat and a bird sang in the big green tree. "
    "The capital of France is Paris and the capital of Italy is Rome, said the king to his daughter."
)


def tokenizer() -> Any:
    """A byte-level BPE tokenizer of 320 tokens (any text round-trips), with <unk>, <s>, </s> and <pad> at ids 0 to 3.

    A new object on every call, since TransformerLens changes the one it is given.
    """
    with _quiet():
        return transformers.AutoTokenizer.from_pretrained(_tokenizer_folder())


@functools.cache
def _tokenizer_folder() -> str:
    # HookedTransformer loads its tokenizer a second time from where it came from: it needs a folder while we run.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=D_VOCAB,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([_TOKENIZER_TEXT] * 10, trainer)
    folder = tempfile.mkdtemp(prefix="tiny_tokenizer_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=N_CTX
    ).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Loading prints, logs and warns; none of it is about us."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
