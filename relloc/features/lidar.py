"""LiDAR: how many directions tell images apart from the views of one image, without labels."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

# Added to the covariance within images, times the mean variance of its dimensions (protocols 3.17).
_RIDGE = 1e-4
# Features that differ by less, relative to their size, differ by the rounding of float32 alone.
_ROUNDING = 10 * torch.finfo(torch.float32).eps

Views = Float[Tensor, "images views d"]


class ViewScatter:
    """Collects features of several views of each image, a batch of images at a time.

    It keeps one mean per image and one matrix of d x d in float64, so that memory does not grow
    with the number of views: 8 (n d + d²) bytes for n images.

    Example:
        >>> scatter = ViewScatter()
        >>> scatter.add(features)  # images x views x d
        >>> scatter.lidar()
    """

    def __init__(self) -> None:
        self._means: list[Float64[Tensor, "images d"]] = []
        self._within: Float64[Tensor, "d d"] | None = None
        self._n_views = 0  # of all images together
        self._n_bad = 0

    @property
    def n(self) -> int:
        """The number of images."""
        return sum(map(len, self._means))

    def add(self, views: Views) -> None:
        """Adds images with the features of their views; each has the same number of views."""
        is_bad = ~views.isfinite()
        self._n_bad += int(is_bad.sum())
        exact = views.double()
        means = exact.mean(dim=1)
        around_means = (exact - means[:, None]).flatten(0, 1)
        scatter = around_means.T @ around_means
        self._means.append(means)
        self._n_views += len(around_means)
        self._within = scatter if self._within is None else self._within + scatter

    def lidar(self) -> float:
        """Returns LiDAR, an effective rank between 1 and min(n - 1, d).

        With B the covariance of the images' means, W the mean covariance of views around the mean
        of their image, and W' = W + 1e-4 tr(W) / d I, it is exp(-sum(p log p)), where p are the
        eigenvalues of W'^-1/2 B W'^-1/2 divided by their sum: Thilak, Huang, Saremi, Dinh, Goh,
        Nakkiran, Susskind, Littwin, "LiDAR", ICLR 2024 (arXiv 2312.04000). Rotating, moving and
        scaling the features changes nothing. That what is added to W goes with its size, which
        makes it so, is relloc's choice, as is 0 log 0 = 0 without a constant within the logarithm.

        Raises:
            ValueError: features are not finite, there are fewer than two images, all views of each
                image have the same features, or all images have the same mean.
        """
        if self._n_bad:
            raise ValueError(f"{self._n_bad} features of patches are not finite")
        if self.n < 2 or self._within is None:
            raise ValueError(f"{self.n} images are too few: it needs 2")
        means = torch.cat(self._means)
        centered = means - means.mean(dim=0)
        d = means.shape[1]
        within = self._within / self._n_views
        rounding = _ROUNDING**2 * float(means.square().mean())
        mean_variance = float(within.diagonal().mean())
        if mean_variance <= rounding:
            raise ValueError(f"the views of each of {self.n} images have the same features")
        if float(centered.square().mean()) <= rounding:
            raise ValueError(f"{self.n} images have the same mean feature")
        identity = torch.eye(d, dtype=means.dtype, device=means.device)
        within = within + _RIDGE * mean_variance * identity
        # With the Cholesky factor L of W', L^-1 B L^-T has the eigenvalues of W'^-1/2 B W'^-1/2,
        # and so has, but for zeros, the matrix of products of the images. Numbers that B and W are
        # divided by scale all eigenvalues alike, and so p not at all.
        factor = torch.linalg.cholesky(within)
        whitened = torch.linalg.solve_triangular(factor, centered.T, upper=False)
        products = whitened.T @ whitened if self.n <= d else whitened @ whitened.T
        # Rounding may leave zeros below 0.
        eigenvalues = torch.linalg.eigvalsh(products).clamp(min=0)
        p = eigenvalues / eigenvalues.sum()
        entropy = torch.special.entr(p).sum()
        return float(entropy.exp())
