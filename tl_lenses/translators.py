"""The one module: `x -> W x + b` per residual-stream site.

The logit lens, the tuned lens, linear shortcuts, the Jacobian lens and maps between models are these with other numbers
in them. What is stored and trained is `D = W - I`, so that decay pulls to the identity (Belrose et al. 2023, section 3).
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_lenses.affine import Affine, base
from tl_lenses.checks import device_named, one_of, plain_text, whole_number
from tl_lenses.deprecation import say
from tl_lenses.layers import canonical, label

Row = tuple[str, str]  # (source site, target site)
CONTROLS = ("unfitted", "shuffled", "bias")  # of the map of a scope (`fit_scope`), in meta["held_out"]


def _name(key: int | str, n_layers: int, what: str = "these translators are for") -> str:
    """The hook name under which a layer or site is stored."""
    try:
        return canonical(key, n_layers)
    except ValueError:
        raise KeyError(f"no layer {key}: {what} layers 0..{n_layers}") from None


def _check_arguments(weights: Any, biases: Any, n_layers: Any, meta: Any) -> None:
    """Check the types and shapes of the arguments of `Translators`."""
    from tl_lenses.files.maps import check_meta

    for name, value, axes in (("weights", weights, "n_rows d_out d_in"), ("biases", biases, "n_rows d_out")):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} should be a tensor of floating point numbers [{axes}], got {kind}")
        if value.ndim != len(axes.split()):
            raise ValueError(f"{name} should have shape [{axes}], got {list(value.shape)}")
    if isinstance(n_layers, bool) or not isinstance(n_layers, int):
        raise TypeError(f"n_layers should be the number of the model's layers, got {n_layers!r}")
    if n_layers < 1:
        raise ValueError(f"n_layers should be at least 1, got {n_layers}")
    check_meta({} if meta is None else meta)


def _meta_of(meta: dict[str, Any], chosen: Sequence[int]) -> dict[str, Any]:
    """The record for some rows: entries that have a value per row keep only theirs."""

    def pick(part: dict[str, Any]) -> dict[str, Any]:
        per_row = {k: [part[k][i] for i in chosen] for k in ("r_squared", "loss", "top1") if isinstance(part.get(k), list)}
        return {**part, **per_row, **{k: pick(v) for k, v in part.items() if k in ("held_out", *CONTROLS)}}

    return pick(meta)


class Translators(nn.Module):
    """Affine maps between residual sites, one per row, with the record of their fit.

    Args:
        rows: `(source, target)` of each map: layers or hook names. Layer `n_layers` is never stored as a source: it is
            the identity.
        weights: `[n_rows, d_out, d_in]`, the full maps.
        biases: `[n_rows, d_out]`.
        n_layers: depth of the source model, so that layers can be used as keys.
        meta: fitter, settings, tokens seen, versions, basis ("raw", "centered" or "mixed"), fingerprint, model name. Of maps
            into another model, `meta["to"]` says the same of that one, and its `n_layers`.

    Raises:
        TypeError: an argument of another kind, or a `meta` that JSON cannot hold.
        ValueError: shapes that do not agree, a row twice or none, numbers that are not finite.
    """

    delta: Float[Tensor, "n_rows d_out d_in"]
    biases: Float[Tensor, "n_rows d_out"]

    def __init__(
        self,
        rows: Iterable[tuple[int | str, int | str]],
        weights: Float[Tensor, "n_rows d_out d_in"],
        biases: Float[Tensor, "n_rows d_out"],
        *,
        n_layers: int,
        meta: dict[str, Any] | None = None,
    ):
        super().__init__()
        _check_arguments(weights, biases, n_layers, meta)
        self.n_layers = n_layers
        self.meta: dict[str, Any] = dict(meta or {})
        # Under the names that keys are looked for: a row given as hook_resid_post would never be found.
        if isinstance(rows, (str, bytes)) or not isinstance(rows, Iterable):
            raise TypeError(f"rows should be pairs (source, target), one per map, got {type(rows).__name__}")
        self.rows: tuple[Row, ...] = tuple(self._row(row) for row in rows)
        if not len(self.rows) == len(weights) == len(biases):
            raise ValueError(f"{len(self.rows)} rows need as many weights and biases, got {len(weights)} and {len(biases)}")
        if weights.shape[1] != biases.shape[1]:
            raise ValueError(f"weights {list(weights.shape)} and biases {list(biases.shape)} differ in d_out")
        if not self.rows:
            raise ValueError("there are no maps: give at least one row (source, target)")
        if len(set(self.rows)) != len(self.rows):
            raise ValueError("a row (source, target) is given twice")
        for row, w, b in zip(self.rows, weights, biases, strict=True):
            if not (w.isfinite().all() and b.isfinite().all()):
                raise ValueError(f"the map of {row[0]!r} has values that are not finite")
        # Frozen: a lens is read far more often than trained. `requires_grad_()` thaws it.
        self.delta = nn.Parameter(weights.detach() - base(*weights.shape[1:]).to(weights), requires_grad=False)
        self.biases = nn.Parameter(biases.detach().clone(), requires_grad=False)

    def _row(self, row: Any) -> Row:
        if isinstance(row, str) or not isinstance(row, Sequence) or len(row) != 2:
            raise ValueError(f"a row should be (source site, target site), got {row!r:.80}")
        return canonical(row[0], self.n_layers), canonical(row[1], self.n_target_layers)

    @property
    def weights(self) -> Float[Tensor, "n_rows d_out d_in"]:
        """The full maps `W = I + D`."""
        return self.delta + base(*self.delta.shape[1:]).to(self.delta)

    @property
    def d_in(self) -> int:
        """Width of the input."""
        return self.delta.shape[2]

    @property
    def d_out(self) -> int:
        """Width of the output."""
        return self.delta.shape[1]

    @property
    def basis(self) -> str:
        """ "raw", "centered" or "mixed": whether the model's residuals have their mean removed (see `identity.basis_of`)."""
        return self.meta.get("basis", "raw")

    @property
    def unit(self) -> bool:
        """Whether the maps read `x / |x|`, as SelfIE adapters do."""
        return bool(self.meta.get("unit", False))

    @property
    def n_target_layers(self) -> int:
        """`n_layers` of the model that the maps lead into: another one's, or the source's own."""
        return self.meta.get("to", {}).get("n_layers", self.n_layers)

    @property
    def target_layers(self) -> int:
        """The old name of `n_target_layers`."""
        say("Translators.target_layers is called n_target_layers now")
        return self.n_target_layers

    @property
    def sources(self) -> tuple[int | str, ...]:
        """Source of each row, as a layer where it is one."""
        return tuple(source for source, _ in self.pairs)

    @property
    def pairs(self) -> tuple[tuple[int | str, int | str], ...]:
        """Source and target of each row, as layers where they are."""
        return tuple((label(s), label(t)) for s, t in self.rows)

    def index(self, source: int | str, target: int | str | None = None) -> int:
        """The old name of a private function: `translators[source, target]` is the map itself."""
        say("Translators.index is going: translators[source] or translators[source, target] is the map")
        return self._index(source, target)

    def _index(self, source: int | str, target: int | str | None = None) -> int:
        """Row number of a source (and a target where there are several)."""
        source_site = _name(source, self.n_layers)
        target_site = None if target is None else _name(target, self.n_target_layers, "targets of these translators are")
        rows = [i for i, (s, t) in enumerate(self.rows) if s == source_site and target_site in (None, t)]
        if not rows:
            asked = source if target is None else (source, target)
            fitted = list(self.sources) if target is None else list(self.pairs)
            raise KeyError(f"layer {asked!r} was not fitted; fitted are {fitted}")
        if len(rows) > 1:
            raise KeyError(
                f"layer {source!r} has several targets: use translators[{source!r}, target] with one of {[self.pairs[i][1] for i in rows]}"
            )
        return rows[0]

    def _is_identity(self, source: int | str, target: int | str | None) -> bool:
        """Whether a key asks for the map of a place to itself, which only a scope's map stores. Between models there is none."""
        if "to" in self.meta or self.d_in != self.d_out:
            return False
        source_site = _name(source, self.n_layers)
        if target is None:
            final = canonical(self.n_layers, self.n_layers)
            return source_site == final and all(s != source_site for s, _ in self.rows)
        return source_site == _name(target, self.n_layers) and (source_site, source_site) not in self.rows

    def __getitem__(self, key: int | str | tuple[int | str, int | str]) -> Affine:
        """The map of a layer or site; `translators[l, l_target]` where one source has several targets.

        Within one model `n_layers` and `[l, l]` are the identity.
        """
        source, target = key if isinstance(key, tuple) else (key, None)
        if self._is_identity(source, target):
            return Affine(torch.eye(self.d_in).to(self.delta), torch.zeros(self.d_in).to(self.delta))
        i = self._index(source, target)
        return Affine(self.delta[i] + base(*self.delta.shape[1:]).to(self.delta), self.biases[i], self.unit)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Affine]:
        return (self[row] for row in self.rows)

    def __contains__(self, key: object) -> bool:
        try:
            self[key]  # type: ignore[index]
        except (KeyError, TypeError):
            return False
        return True

    def forward(self, x: Float[Tensor, "n_rows *batch d_in"]) -> Float[Tensor, "n_rows *batch d_out"]:
        """Every row applied to its own input: `y_i = x_i + D_i x_i + b_i`."""
        n = x.shape[0]
        x = nn.functional.normalize(x, dim=-1) if self.unit else x
        flat = x.reshape(n, -1, x.shape[-1])
        y = torch.baddbmm(self.biases[:, None], flat, self.delta.mT)
        if self.d_in == self.d_out:
            y = y + flat
        return y.reshape(*x.shape[:-1], self.d_out)

    def select(self, layers: Sequence[int | str | tuple[int | str, int | str]]) -> "Translators":
        """The maps of some source layers (or pairs `(l, l_target)`) only."""
        if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence) or not layers:
            raise TypeError(f"layers should be a list with at least one layer or pair of layers, got {layers!r:.80}")
        for layer in layers:
            if isinstance(layer, tuple) and len(layer) != 2:
                raise ValueError(f"a pair should be (layer, target layer), got {layer!r}")
        chosen = [self._index(*layer) if isinstance(layer, tuple) else self._index(layer) for layer in layers]
        rows, meta = [self.rows[i] for i in chosen], _meta_of(self.meta, chosen)
        return Translators(rows, self.weights[chosen], self.biases[chosen], n_layers=self.n_layers, meta=meta)

    def to_raw(self) -> "Translators":
        """Maps fitted on mean-removed residuals, for the same model unprocessed: `W -> W (I - 1 1^T / d)`, exactly.

        Source: the centred stream is `h - mean(h)`, so `W (h - mean(h)) + b = W (I - 1 1^T / d) h + b`.

        Raises:
            ValueError: the maps are of a "mixed" stream, and read its mean.
        """
        return self._in_basis("raw")

    def to_centered(self) -> "Translators":
        """Maps fitted on raw residuals, for the model with centred writing weights: `W -> P W`, `b -> P b`, P = I - 1 1^T / d.

        The centred stream is `P h`, of the map's result too. `P (W h + b) = P W (P h) + P b` where `P W 1 = 0`, as for
        biases alone; elsewhere the map reads the mean of h, which the centred stream has lost.

        Raises:
            ValueError: the maps read the mean.
        """
        return self._in_basis("centered")

    def _in_basis(self, basis: str) -> "Translators":
        """The maps for the same model in another basis. Streams of one model differ by their mean, which the final norm removes."""
        if self.basis == basis:
            return self
        if self.unit:
            raise ValueError(
                "these maps read h / |h|, and the length of h with its mean is not that without: no other basis has the same map; fit on this model"
            )
        w, b = self.weights.double(), self.biases.double()
        if self.basis == "centered":
            w = w - w.mean(-1, keepdim=True)
        else:
            w, b = w - w.mean(-2, keepdim=True), b - b.mean(-1, keepdim=True)
            read = w.sum(-1).abs().amax() / w.abs().sum(-1).amax().clamp_min(1e-30)
            if read > 1e-5:
                raise ValueError(
                    f"these translators read the mean of the residual (|P W 1| is {read:.1e} of |W|), which a model with centred writing weights "
                    "has lost: load the model with center_writing_weights=False (HookedTransformer) or without "
                    "enable_compatibility_mode() (TransformerBridge), or fit on this model"
                )
        meta = {**self.meta, "basis": basis}
        return Translators(self.rows, w.to(self.delta), b.to(self.biases), n_layers=self.n_layers, meta=meta)

    def extra_repr(self) -> str:
        """One line for `repr`."""
        to = self.meta.get("to")
        several = to is not None or len(set(self.sources)) < len(self)
        shown = list(self.pairs) if several else list(self.sources)
        parts = [f"{len(self)} maps {self.d_in} -> {self.d_out}", f"{'pairs' if several else 'layers'} {shown}"]
        parts += [f"{k}={self.meta[k]!r}" for k in ("fitter", "model", "tokens_seen", "basis") if k in self.meta]
        return ", ".join(parts + ([f"to={to.get('model')!r}"] if to is not None else []))

    def _records(self) -> list[dict[str, Any]]:
        """A row per map: source, target, |W - I| and |b| (Frobenius norms), and held-out R^2, or loss and top1 of a scope's map."""
        held_out = self.meta.get("held_out", {})
        norms = torch.linalg.matrix_norm(self.delta.detach().float()).tolist()
        biases = self.biases.detach().float().norm(dim=-1).tolist()
        scores = {"r_squared": held_out.get("r_squared") or [None] * len(self)}
        if "top1" in held_out:
            scores = {"loss": held_out["loss"], "top1": held_out["top1"], **{k: held_out[k]["top1"] for k in CONTROLS}}
        columns = {"delta": norms, **scores} if "top1" in held_out else {"delta": norms, "bias": biases, **scores}
        return [
            {"source": s, "target": t, **{name: values[i] for name, values in columns.items()}}
            for i, (s, t) in enumerate(self.pairs)
        ]

    def to_frame(self) -> Any:
        """A pandas data frame, a row per map: source, target, delta, bias, r_squared.

        `delta` is the Frobenius norm of W - I (of W, between spaces of different width), `bias` the norm of b,
        `r_squared` that on held-out text, where it was measured. Of a scope's map (`fit_scope`) delta, loss, top1 and the top1 of the
        controls: unfitted, shuffled, bias.
        """
        from tl_lenses import views

        return views.rows_frame(self._records())

    def _table(self) -> tuple[str, list[str], list[list[Any]], str]:
        rows = [[str(r["source"]), str(r["target"]), *list(r.values())[2:]] for r in self._records()]
        identity = "W - I" if self.d_in == self.d_out else "W"
        columns, held_out = ["source", "target", f"|{identity}|", "|b|", "R^2"], self.meta.get("held_out")
        kind = self.meta.get("fitter", "maps")
        model = f" of {self.meta['model']}" if "model" in self.meta else ""
        to = f" to {self.meta['to'].get('model')}" if "to" in self.meta else ""
        if held_out is not None and "top1" in held_out:
            note = f"loss (nats per token) and share of right tokens on {held_out['vectors']} held-out vectors"
            return f"{kind}{model}{to}", [*columns[:3], "loss", "top-1", *CONTROLS], rows, note
        if held_out is None or "r_squared" not in held_out:
            return f"{kind}{model}{to}", columns[:-1], [row[:-1] for row in rows], ""
        note = f"R^2 on {held_out['tokens']} held-out tokens"
        if "agreement" in held_out:
            note += f"; the two models' next tokens agree, unpatched, at {held_out['agreement']:.1%}"
        return f"{kind}{model}{to}", columns, rows, note

    def __rich__(self) -> Any:
        from tl_lenses import views

        return views.rows_table(*self._table())

    def __str__(self) -> str:
        from tl_lenses import views

        return views.to_text(self.__rich__())

    def _repr_html_(self) -> str:
        from tl_lenses import views

        return views.rows_html(*self._table())

    def save(self, path: Any, *, overwrite: bool = False) -> None:
        """Write `translators.safetensors` and `config.json` into a folder, atomically.

        Args:
            path: the folder; made with its parents.
            overwrite: replace the translators that are there.

        Raises:
            ValueError: the folder exists, holds files that are not of translators, or cannot be written.
            TypeError: `meta` holds what JSON cannot.
            OSError: the disk filled; nothing was changed.
        """
        from tl_lenses import files

        tensors = {"delta": self.delta, "biases": self.biases}
        sizes = {"n_layers": self.n_layers, "d_in": self.d_in, "d_out": self.d_out}
        files.save_maps(path, tensors, sizes, [list(row) for row in self.rows], self.meta, overwrite=overwrite)

    def export(self, kind: Literal["tuned-lens", "jacobian-lens", "selfie"], path: Any, *, overwrite: bool = False) -> Path:
        """Write the maps as files that another package loads.

        Args:
            kind: "tuned-lens" (`TunedLens.from_unembed_and_pretrained(..., path)`; all layers), "jacobian-lens"
                (`JacobianLens.load(path / "lens.pt")`, of TransformerLens too; no biases, no layer 0) or "selfie"
                (`load_adapter(path / "adapter.safetensors")`; one map to layer 0).
            path: the folder; made with its parents.
            overwrite: replace an export that is there.

        Returns:
            What to give to that package: the folder, or the file in it.

        Raises:
            ValueError: the format has no place for these maps; says which. The folder is not free.

        Example:
            >>> translators.export("tuned-lens", "for-tuned-lens")      # doctest: +SKIP
        """
        from tl_lenses import files

        one_of("kind", kind, tuple(files.FORMATS))
        raw = self.to_raw()
        rows = {pair: (raw.delta[i].detach().cpu(), raw.biases[i].detach().cpu()) for i, pair in enumerate(raw.pairs)}
        return files.write_foreign(path, kind, rows, self.n_layers, raw.meta, overwrite=overwrite)

    @staticmethod
    def load(
        path_or_hub_id: Any,
        *,
        device: str | torch.device = "cpu",
        n_layers: int | None = None,
        target_layer: int | None = None,
        source_layer: int | None = None,
        filename: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: Any = None,
    ) -> "Translators":
        """Read a lens: a folder of `save`, files of other packages, or either from the Hugging Face Hub.

        The format is given by what is in the files: tuned-lens, Jacobian lenses (jacobian-lens and its checkpoints,
        TransformerLens, R-lens, J++, stacks in safetensors), linear shortcuts, SelfIE adapters; a live `JacobianLens`
        of TransformerLens is taken too. `tl_lenses.files.foreign` has the table of rows.

        Args:
            path_or_hub_id: a folder or file; a Hub repository "owner/name" with a lens of ours; the name of a model that has
                a lens in the Space of tuned-lens.
            device: where the maps are put.
            n_layers: of the model, where the file does not say it.
            target_layer: the residual layer that the maps end in, where the file does not say it.
            source_layer: the layer that a SelfIE adapter reads.
            filename: a file of the Hub repository, in any of the formats.
            revision, token, cache_dir: as the Hub takes them.

        Raises:
            FileNotFoundError: neither a path nor on the Hub; says what was tried.
            ValueError: a format that is not known, or a damaged file; says which file and why.

        Warns:
            UserWarning: what a file of another package does not say.

        Example:
            >>> tll.Translators.load("EleutherAI/pythia-160m")                                      # doctest: +SKIP
            >>> tll.Translators.load("neuronpedia/jacobian-lens", n_layers=12, filename=            # doctest: +SKIP
            ...     "gpt2-small/jlens/Salesforce-wikitext/gpt2_jacobian_lens.pt")
        """
        from tl_lenses import files

        device = device_named(device)
        for name, value in (("filename", filename), ("revision", revision), ("token", token)):
            if value is not None:
                plain_text(name, value)
        cache_dir = None if cache_dir is None else files.as_path(cache_dir)
        layers = {"n_layers": n_layers, "target_layer": target_layer, "source_layer": source_layer}
        given = files.Given(**{k: whole_number(k, n, least=0) for k, n in layers.items() if n is not None})
        if isinstance(path_or_hub_id, files.HasJacobians):
            place: Any = path_or_hub_id
        else:
            place = None if filename else files.place_of(path_or_hub_id)
            if place is None:
                place = files.fetch(str(path_or_hub_id), filename, files.Access(revision, token, cache_dir))
        ours = isinstance(place, Path) and files.is_ours(place)
        tensors, config = files.load_maps(place) if ours else files.read_foreign(place, given)
        try:
            rows, about = map(tuple, config["rows"]), {name: config[name] for name in ("n_layers", "meta")}
            translators = Translators(rows, tensors["delta"], tensors["biases"], **about)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the translators in {path_or_hub_id} are damaged: {error}; copy them again") from None
        # The constructor takes full maps. What was stored is D, put back as it was so that a round trip is exact.
        translators.delta.data = tensors["delta"]
        return translators.to(device)
