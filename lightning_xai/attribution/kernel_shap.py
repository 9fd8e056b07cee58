"""Kernel SHAP (Lundberg and Lee, 2017): Shapley values of patches and tokens, from random coalitions of them.

Shape suffixes: N coalitions, F features (patches or tokens), L tokens, h x w pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from math import comb

import captum.attr
import torch
from captum._utils.models.model import Model
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_xai.attribution.one_tower import Input, Mapped, OneTowerMethod
from lightning_xai.attribution.patch_grid import PatchGrid
from lightning_xai.attribution.perturbation import forward_only, only_tokens
from lightning_xai.attribution.reference import ImageReference, reference_image
from lightning_xai.attribution.score import Score
from lightning_xai.models.encoder import TwoTowerEncoder

# The paper's weight of the empty and the full coalition is infinite. Captum's 1e6 lets the other samples pull the sum
# off by more than rounding does; this is still far from what float64 resolves.
_INFINITE_WEIGHT = 1e12

_Value = Callable[[Tensor], Tensor]
"""Coalitions [N, F] (true: present) -> values of the target [N]."""


class KernelSHAP(OneTowerMethod):
    """Shapley values of the target, estimated by Captum's Kernel SHAP.

    An absent patch shows the reference image, an absent content token is the padding token; start and end always
    stay. A coalition's value is the target with the whole other modality. Shapley values are the weighted least-squares
    fit of coalitions' values by sums ("A Unified Approach to Interpreting Model Predictions", Eq. 8 and
    Theorem 2); Captum draws coalition sizes by the kernel. Where all coalitions together are no more than the samples,
    each is taken once, which makes the values exact. Signed; each map sums to
    `s(everything present) - s(everything absent)` (efficiency). `completeness_error` of a pair is the image map's sum
    minus that difference, or the text map's, whichever is larger in magnitude; it is rounding, and says nothing of the
    errors of single values, which fall with the number of samples.

    The same coalitions are drawn for each pair, from `seed`; the global random state stays as it was. Memory for inputs
    grows with `internal_batch_size`; of all samples only their coalitions and values are kept.

    Args:
        encoder: the model to explain.
        image_samples: coalitions of patches.
        text_samples: coalitions of tokens.
        seed: of the draws.
        image_reference: what absent patches show: `"zeros"` (zero after normalisation) or `"black"`.
        internal_batch_size: masked inputs that pass through a tower at a time; None: as many as there are samples.

    Raises:
        ValueError: fewer samples than unknowns, an unknown reference, or an unsupported tower.
    """

    signed = True
    stochastic = True
    _wide = True

    def __init__(
        self,
        encoder: TwoTowerEncoder,
        *,
        image_samples: int = 2048,
        text_samples: int = 256,
        seed: int = 0,
        image_reference: ImageReference = "zeros",
        internal_batch_size: int | None = 64,
    ) -> None:
        super().__init__(encoder, internal_batch_size=internal_batch_size)
        reference_image(encoder, image_reference)
        rows, columns = self.grid
        _check_samples("image_samples", image_samples, rows * columns, "patches")
        self._patches = PatchGrid((rows, columns))
        self._image_samples = image_samples
        self._text_samples = text_samples
        self._seed = seed
        self._image_reference = image_reference

    def _read_text(self, tokens: Tensor) -> Input:
        most = int(self.encoder.tokenizer.content_mask(tokens).sum(dim=1).max())
        _check_samples("text_samples", self._text_samples, most, "tokens of a caption")
        return super()._read_text(tokens)

    def _image_map(self, image: Input, score: Score) -> Mapped:
        reference = reference_image(self.encoder, self._image_reference)
        rows = range(len(image.batch))
        with forward_only():
            maps_BHW = torch.stack([self._of_image(image.batch[row], score[row : row + 1]) for row in rows])
            nothing_shown = self.encoder.encode_image(reference[None]).expand_as(image.embedding)
        return maps_BHW, maps_BHW.sum(dim=(1, 2)) - score(image.embedding) + score(nothing_shown)

    def _text_map(self, text: Input, score: Score) -> Mapped:
        tokens, content_BL = text.batch, self.encoder.tokenizer.content_mask(text.batch)
        with forward_only():
            maps_BL = torch.stack(
                [self._of_caption(tokens[i], content_BL[i], score[i : i + 1]) for i in range(len(tokens))]
            )
            empty = only_tokens(tokens, ~content_BL, self.encoder.tokenizer.padding_id)
            nothing_said = self.encoder.encode_text(empty)
        return maps_BL, maps_BL.sum(dim=1) - score(text.embedding) + score(nothing_said)

    def _of_image(self, image: Tensor, score: Score) -> Tensor:
        """The values [H, W] of one image's patches."""
        reference = reference_image(self.encoder, self._image_reference)
        (rows, columns), (height, width) = self._patches.grid, image.shape[1:]

        def value(present_NF: Tensor) -> Tensor:
            present_NHW = present_NF.to(image.device).reshape(-1, rows, columns)
            present_Nhw = self._patches.spread(present_NHW, (height, width))
            return score(self.encoder.encode_image(torch.where(present_Nhw.unsqueeze(1), image, reference)))

        values_F = self._shapley_values(value, rows * columns, self._image_samples)
        return values_F.to(score.directions).reshape(rows, columns)

    def _of_caption(self, tokens_L: Tensor, content_L: Tensor, score: Score) -> Tensor:
        """The values [L] of one caption's tokens."""
        padding_id = self.encoder.tokenizer.padding_id

        def value(present_NF: Tensor) -> Tensor:
            kept_NL = (~content_L).repeat(len(present_NF), 1)
            kept_NL[:, content_L] = present_NF.to(tokens_L.device)
            return score(self.encoder.encode_text(only_tokens(tokens_L, kept_NL, padding_id)))

        values = score.directions.new_zeros(len(tokens_L))
        values[content_L] = self._shapley_values(value, int(content_L.sum()), self._text_samples).to(values)
        return values

    def _shapley_values(self, value: _Value, features: int, samples: int) -> Tensor:
        """Shapley values [F] of a game."""
        if features < 2:
            # The one player gets everything; there is no coalition that Captum could draw.
            ends = torch.tensor([[True], [False]])[:, :features]
            return -value(ends).diff()[:features]
        explainer = captum.attr.KernelShap(lambda present: value(present.bool()).cpu())
        explainer.interpretable_model = _LeastSquares()
        explainer.inf_weight = _INFINITE_WEIGHT
        if 2**features <= samples:
            explainer.perturb_func, explainer.similarity_func = _every_coalition, _shapley_kernel
            samples = 2**features
        # Captum draws from the global generator of the CPU; manual_seed of torch itself would also touch the GPU's.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._seed)
            # The features are given as numbers, 1 for present: making inputs of them is cheapest for many at a time.
            values: Tensor = explainer.attribute(
                torch.ones(1, features),
                baselines=torch.zeros(1, features),
                n_samples=samples,
                perturbations_per_eval=self.internal_batch_size or samples,
                return_input_shape=False,
            )
        return values


def _every_coalition(inputs: Tensor, *, num_interp_features: int, **options: object) -> Iterator[Tensor]:
    """All subsets of the features, one [1, F] at a time, in place of Captum's draws."""
    for members in product((1, 0), repeat=num_interp_features):
        yield torch.tensor([members])


def _shapley_kernel(
    inputs: Tensor, masked: Tensor, coalition_1F: Tensor, *, num_interp_features: int, **options: object
) -> float:
    """The weight of a coalition among all (Theorem 2), in place of that of a draw, which is one."""
    size, total = int(coalition_1F.sum()), num_interp_features
    if size in (0, total):
        return _INFINITE_WEIGHT
    return (total - 1) / (comb(total, size) * size * (total - size))


class _LeastSquares(Model):  # type: ignore[misc]  # Captum has no types
    """The linear model with intercept that fits weighted samples best; of several such, the one of least norm."""

    def __init__(self) -> None:
        self._coefficients = torch.empty(0)

    def fit(self, train_data: DataLoader[tuple[Tensor, ...]], **kwargs: object) -> None:
        """Fit samples [N, F], their values [N] and weights [N], in float64."""
        samples, values, weights = (torch.cat(column).double() for column in zip(*train_data, strict=True))
        root_N1 = weights.sqrt().unsqueeze(1)
        design = torch.cat([samples, torch.ones_like(root_N1)], dim=1)
        if not values.isfinite().all():
            # LAPACK would raise another error; `attribute` says what a map that is not finite means.
            self._coefficients = torch.full_like(design[0], torch.nan)
            return
        # By singular values: the default's pivoting leaves undetermined coefficients to chance on older PyTorch.
        fit = torch.linalg.lstsq(design * root_N1, values.unsqueeze(1) * root_N1, driver="gelsd")
        self._coefficients = fit.solution[:, 0]

    def representation(self) -> Tensor:
        """The coefficients [F], without the intercept."""
        return self._coefficients[:-1]

    def __call__(self, x: Tensor) -> Tensor:
        """Predictions [N] for samples [N, F]."""
        return x.to(self._coefficients) @ self._coefficients[:-1] + self._coefficients[-1]


def _check_samples(name: str, samples: int, features: int, unit: str) -> None:
    # In addition to the two ends, at least one sample for each value that is not settled by them.
    if samples < features + 1:
        raise ValueError(
            f"{name} has to be at least {features + 1} for {features} {unit}, or the values are not determined; "
            f"got {samples}"
        )
