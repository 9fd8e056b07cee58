"""RISE (Petsiuk et al., 2018): the similarity of randomly masked inputs, averaged over the masks that show a part.

Shape suffixes: N masks, B pairs, L tokens, K embedding width, C cells of a mask, H x W the patch grid, h x w pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_xai.attribution.one_tower import Input, Mapped, OneTowerMethod
from lightning_xai.attribution.patch_grid import PatchGrid
from lightning_xai.attribution.perturbation import forward_only, only_tokens
from lightning_xai.attribution.reference import reference_image
from lightning_xai.attribution.score import Score
from lightning_xai.models.encoder import TwoTowerEncoder


class RISE(OneTowerMethod):
    """Importance of a part as the expected similarity, or other target, of masked inputs that show it.

    `S(part) = sum_i s(x * m_i) m_i(part) / (N p)` ("RISE: Randomized Input Sampling for Explanation of Black-box
    Models", Eq. 6). Image masks are grids of random cells, shown with probability p, enlarged bilinearly and shifted at
    random (section 3.2); hidden pixels turn to zero after normalisation, the mean colour (hidden sound to silence),
    and a patch's part of a mask is the mask's mean over it. Text masks keep each content token with probability p, else
    put the padding token in its place; start and end always stay, and are zero in the map.

    Signed as the similarity is. By construction all parts share a large common term, `s` of a random mask: only
    differences within a map mean something.

    All pairs see the same masks. Masks are drawn chunk by chunk, so that memory grows with `internal_batch_size`, not
    with their number; chunks change no mask.

    Args:
        encoder: the model to explain.
        image_masks: number of image masks.
        text_masks: number of text masks.
        cells: rows and columns of an image mask before it is enlarged.
        probability: p, of a cell or token to be shown.
        seed: of the masks.
        internal_batch_size: masked inputs that pass through a tower at a time; None: as many as there are masks.

    Raises:
        ValueError: no masks, no cells, a probability not between 0 and 1, or an unsupported tower.
    """

    stochastic = True
    has_zero = False
    _wide = True

    def __init__(
        self,
        encoder: TwoTowerEncoder,
        *,
        image_masks: int = 2048,
        text_masks: int = 256,
        cells: int = 7,
        probability: float = 0.5,
        seed: int = 0,
        internal_batch_size: int | None = 64,
    ) -> None:
        super().__init__(encoder, internal_batch_size=internal_batch_size)
        for name, number in (("image_masks", image_masks), ("text_masks", text_masks), ("cells", cells)):
            if number < 1:
                raise ValueError(f"{name} has to be at least 1; got {number}")
        if not 0 < probability < 1:
            raise ValueError(f"probability has to lie between 0 and 1, or no mask hides a part; got {probability}")
        self._patches = PatchGrid(self.grid)
        self._image_masks = image_masks
        self._text_masks = text_masks
        self._cells = cells
        self._probability = probability
        self._seed = seed

    def _image_map(self, image: Input, score: Score) -> Mapped:
        maps_BHW = image.embedding.new_zeros(len(image.batch), *self._patches.grid)
        nothing = reference_image(self.encoder, "zeros")
        with forward_only():
            for masks_Nhw in self._draw_image_masks(image.batch):
                parts_NHW = self._patches.means(masks_Nhw.to(maps_BHW))
                for row, pixels in enumerate(image.batch):
                    embeddings_NK = self.encoder.encode_image(torch.lerp(nothing, pixels, masks_Nhw.unsqueeze(1)))
                    scores_N = score[row : row + 1](embeddings_NK)
                    maps_BHW[row] += torch.einsum("n,nhw->hw", scores_N, parts_NHW)
        return maps_BHW / (self._image_masks * self._probability), None

    def _text_map(self, text: Input, score: Score) -> Mapped:
        tokens, padding_id = text.batch, self.encoder.tokenizer.padding_id
        content_BL = self.encoder.tokenizer.content_mask(tokens)
        maps_BL = text.embedding.new_zeros(tokens.shape)
        with forward_only():
            for shown_NL in self._draw_text_masks(tokens):
                for row, tokens_L in enumerate(tokens):
                    masked_NL = only_tokens(tokens_L, shown_NL | ~content_BL[row], padding_id)
                    scores_N = score[row : row + 1](self.encoder.encode_text(masked_NL))
                    maps_BL[row] += scores_N @ shown_NL.to(scores_N)
        return content_BL * maps_BL / (self._text_masks * self._probability), None

    def _draw_image_masks(self, images: Tensor) -> Iterator[Tensor]:
        """Chunks of masks [N, h, w] in [0, 1], of the images' type and device.

        Bilinear enlargement is a matrix for the rows times one for the columns, and a shift a choice of their rows.
        The sides of an enlarged cell are rounded up, as in the authors' code, for the shifted mask to cover the image.
        """
        height, width = images.shape[2:]
        cell_height, cell_width = -(-height // self._cells), -(-width // self._cells)
        rows = _enlargement(self._cells, cell_height).to(images)
        columns = _enlargement(self._cells, cell_width).to(images)
        for draws in self._draw(self._image_masks, self._cells**2 + 2):
            shown_NCC = (draws[:, 2:] < self._probability).reshape(-1, self._cells, self._cells).to(images)
            top_N1, left_N1 = (draws[:, :1] * cell_height).long(), (draws[:, 1:2] * cell_width).long()
            rows_NhC = rows[top_N1 + torch.arange(height)]
            columns_NwC = columns[left_N1 + torch.arange(width)]
            yield rows_NhC @ shown_NCC @ columns_NwC.mT

    def _draw_text_masks(self, tokens: Tensor) -> Iterator[Tensor]:
        """Chunks of masks [N, L], true where a token is shown; the same however long the padding."""
        length = tokens.shape[1]
        for draws in self._draw(self._text_masks, max(length, self.encoder.tokenizer.context_length)):
            yield (draws[:, :length] < self._probability).to(tokens.device)

    def _draw(self, masks: int, numbers: int) -> Iterator[Tensor]:
        """Uniform numbers in [0, 1), so many for each mask, by chunks of masks."""
        generator = torch.Generator().manual_seed(self._seed)
        for rows in self._chunks(masks):
            yield torch.rand(min(rows.stop, masks) - rows.start, numbers, generator=generator)


def _enlargement(cells: int, side: int) -> Tensor:
    """[(cells + 1) * side, cells]: values of cells to bilinear values at (cells + 1) * side pixels."""
    return interpolate(torch.eye(cells)[None], size=(cells + 1) * side, mode="linear", align_corners=False)[0].mT
