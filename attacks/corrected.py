"""Attacks whose torchattacks class is not the paper's attack or is faulty: subclasses that mend it, each saying what.

Shapes: N images, C channels, H x W pixels, K classes, J rival classes; images lie in [0, 1].
"""

from __future__ import annotations

import torch
import torchattacks
from torch import Tensor, nn

from attacks.best import where
from attacks.threat import Norm
from attacks.tidy import Tidy, lengths, project, slope, steepest
from spaces.exceptions import InputError

CROSSING = 1e-4
"""How far beyond the linearised boundary each of DeepFool's steps goes, L2, in pixel units of [0, 1]."""


class PGD(Tidy, torchattacks.PGD):  # type: ignore[misc]  # torchattacks is not typed
    """Projected gradient ascent of the cross-entropy, in either norm; FGSM and iFGSM are special cases.

    Mends the stock FGSM, BIM, PGD and PGDL2: (1) an image's random start comes from the global generator and so depends
    on the images beside it; (2) the L2 one takes the mean loss of the batch, and so divides small gradients by its
    1e-10, and starts inside the ball at uniform radii (as here); (3) an image that an earlier iterate has fooled
    may come back right: with `stops` it is returned as found, and costs no further step.

    Args:
        eps: bound of the perturbation, in pixel units of [0, 1].
        alpha: step size, in the same units.
        random_start: from a uniform point of the ball (L2: uniform direction and radius), else from the image.

    After a call `gains` holds the mean gain of the images that were still attacked, before each step.

    Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, 2017, section 2.1; FGSM,
    Goodfellow et al. 2014, is one step of eps without a random start, iFGSM, Kurakin et al. 2016, several.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        norm: Norm = "Linf",
    ) -> None:
        super().__init__(model, eps, alpha, steps, random_start)
        self.attack = type(self).__name__
        self.norm = norm
        self.gains: list[Tensor] = []

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        x_NCHW, aim_N = self._given(x_NCHW, y_N)
        moved_NCHW = self._start(x_NCHW) if self.random_start else x_NCHW.clone()
        going = torch.arange(len(x_NCHW), device=x_NCHW.device)
        self.gains = []
        for _ in range(self.steps):
            slope_NCHW, gain_N, found_N = self._look(moved_NCHW[going], aim_N[going])
            self.gains.append(gain_N.mean())
            if self.stops:
                left = (~found_N).nonzero().flatten()
                going, slope_NCHW = going[left], slope_NCHW[left]
                if len(going) == 0:
                    break
            step_NCHW = self.alpha * steepest(slope_NCHW, self.norm)
            moved_NCHW[going] = project(moved_NCHW[going] + step_NCHW, x_NCHW[going], self.eps, self.norm)
        return moved_NCHW

    def _start(self, x_NCHW: Tensor) -> Tensor:
        draws, shape = self._random(x_NCHW), x_NCHW.shape[1:]
        if self.norm == "Linf":
            return (x_NCHW + self.eps * (2 * draws.uniform(*shape) - 1)).clamp(0, 1)
        direction_NCHW = draws.normal(*shape)
        radius_N111 = self.eps * draws.uniform(1, 1, 1)
        return (x_NCHW + radius_N111 * direction_NCHW / lengths(direction_NCHW)).clamp(0, 1)


class RandFGSM(Tidy):
    """RAND+FGSM: a random sign step of alpha, then FGSM with what is left of eps.

    The stock RFGSM takes alpha for the noise and for each step too: with eps 0.3, alpha 0.05 and one step it moves
    a pixel by 0.1 at most.

    Args:
        eps: bound of the perturbation, L-inf, in pixel units of [0, 1].
        alpha: how much of eps is the random step.

    Raises:
        InputError: alpha is not from 0 to below eps.

    Source: Tramer et al., Ensemble Adversarial Training, 2018, section 3.3: x' = x + alpha sign(N(0, I)),
    x_adv = x' + (eps - alpha) sign(grad J(x', y)).
    """

    def __init__(self, model: nn.Module, eps: float = 0.3, alpha: float = 0.05) -> None:
        if not (0 <= alpha < eps or alpha == eps == 0):
            raise InputError(f"alpha must be from 0 to below eps, {eps:g}, since it is a part of it, but is {alpha:g}")
        super().__init__("RandFGSM", model)
        self.eps = eps
        self.alpha = alpha
        self.supported_mode = ["default", "targeted"]

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        x_NCHW, aim_N = self._given(x_NCHW, y_N)
        noisy_NCHW = (x_NCHW + self.alpha * self._random(x_NCHW).sign(*x_NCHW.shape[1:])).clamp(0, 1)
        step_NCHW = (self.eps - self.alpha) * self._look(noisy_NCHW, aim_N)[0].sign()
        return (noisy_NCHW + step_NCHW).clamp(0, 1)


class CW(Tidy, torchattacks.CW):  # type: ignore[misc]  # torchattacks is not typed
    """CW L2, image by image.

    Mends the stock CW: (1) pixels at 0 and 1 map to atanh(+-1), infinite, and never move; (2) the best other logit
    is taken as 0 where all are negative, since the label's is multiplied away; (3) the early stop looks at the
    batch's sum, so that an image's result depends on the others': here none stops early; (4) an image counts as
    found below the confidence kappa, which so has no effect; (5) c is not searched.

    Of an image for which nothing is found the original is returned.

    Args:
        c: weight of the classification term; the first one tried if it is searched.
        kappa: by how much, in logits, the wrong class (or the target) must lead.
        lr: of Adam, on w = atanh(2x - 1). Pixels at 0 and 1 start at w = -+7.25, where tanh is flat, and take part
            only where lr * steps is about 10: on binarised digits lr 0.1 and 50 steps find 8 %, 0.2 finds 94 %.
        binary_search_steps: values of c tried for each image; 0 and 1: `c` alone.

    Source: Carlini and Wagner, Towards Evaluating the Robustness of Neural Networks, 2017, sections V.B, VI.A, and
    for (1) and the search's bounds CleverHans 4.0, carlini_wagner_l2.
    """

    def __init__(
        self,
        model: nn.Module,
        c: float = 1.0,
        kappa: float = 0.0,
        steps: int = 50,
        lr: float = 0.01,
        binary_search_steps: int = 0,
    ) -> None:
        super().__init__(model, c, kappa, steps, lr)
        self.binary_search_steps = binary_search_steps

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        x_NCHW, aim_N = self._given(x_NCHW, y_N)
        best_NCHW, best_N = x_NCHW.clone(), x_NCHW.new_full((len(x_NCHW),), torch.inf)
        c_N = torch.full_like(best_N, self.c)
        low_N, high_N = torch.zeros_like(c_N), torch.full_like(c_N, torch.inf)
        for _ in range(max(1, self.binary_search_steps)):
            found_N = self._minimise(x_NCHW, aim_N, c_N, best_NCHW, best_N)
            low_N, high_N = torch.where(found_N, low_N, c_N), torch.where(found_N, c_N, high_N)
            c_N = torch.where(high_N.isfinite(), (low_N + high_N) / 2, 10 * c_N)
        return best_NCHW

    def _minimise(self, x_NCHW: Tensor, aim_N: Tensor, c_N: Tensor, best_NCHW: Tensor, best_N: Tensor) -> Tensor:
        """Descend once, improve `best_NCHW` and its squared distances `best_N` in place; return who succeeded."""
        w_NCHW = self.inverse_tanh_space(x_NCHW).requires_grad_()
        adam = torch.optim.Adam([w_NCHW], lr=self.lr)
        found_N = torch.zeros_like(aim_N, dtype=torch.bool)
        for _ in range(self.steps):
            moved_NCHW = self.tanh_space(w_NCHW)
            squared_N = (moved_NCHW - x_NCHW).square().flatten(1).sum(1)
            logits_NK = self.get_logits(moved_NCHW)
            f_N = self.f(logits_NK, aim_N)
            (w_NCHW.grad,) = torch.autograd.grad((squared_N + c_N * f_N).sum(), w_NCHW)
            adam.step()
            with torch.no_grad():
                hit_N = ((logits_NK.argmax(1) == aim_N) == self.targeted) & (f_N <= -self.kappa)
                better_N = hit_N & (squared_N < best_N)
                best_N.copy_(torch.where(better_N, squared_N, best_N))
                best_NCHW.copy_(where(better_N, moved_NCHW, best_NCHW))
                found_N |= hit_N
        return found_N

    def inverse_tanh_space(self, x_NCHW: Tensor) -> Tensor:
        return torch.atanh((2 * x_NCHW - 1) * 0.999999)

    def f(self, logits_NK: Tensor, aim_N: Tensor) -> Tensor:
        """Return what is left of the margin to lose, at least -kappa. Source: section V.A, f_6."""
        aim_N1 = aim_N[:, None]
        real_N = logits_NK.gather(1, aim_N1).squeeze(1)
        other_N = logits_NK.scatter(1, aim_N1, -torch.inf).max(1).values
        return (other_N - real_N if self.targeted else real_N - other_N).clamp(min=-self.kappa)


class DeepFool(Tidy, torchattacks.DeepFool):  # type: ignore[misc]  # torchattacks is not typed
    """DeepFool of all images at once; an image stops where the model is wrong.

    Mends the stock DeepFool: (1) it goes image by image; (2) where a gradient is zero it divides by it: the image
    becomes NaN, whose predicted class is 0 and counts as a success. Here that image stops where it is; (3) where
    pixels are held at 0 or 1 its steps shrink towards the boundary without crossing it: of 64 digits 60 end
    within 1e-6 of it, right or wrong as rounding has it. Here each step goes `CROSSING` beyond, as in CleverHans.

    Args:
        overshoot: by what share each step is longer than to the linearised boundary.
        classes: how many classes are considered: the label, and those next to it by the given image's logits.

    Source: Moosavi-Dezfooli et al., DeepFool, 2016, Algorithm 2; overshoot and classes as in its authors' code.
    """

    def __init__(self, model: nn.Module, steps: int = 50, overshoot: float = 0.02, classes: int = 10) -> None:
        super().__init__(model, steps, overshoot)
        self.classes = classes

    def forward_return_target_labels(self, x_NCHW: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images, and the class that each is found in."""
        x_NCHW, y_N = self._given(x_NCHW, y_N)
        x_NCHW = x_NCHW.clone()
        with torch.no_grad():
            logits_NK = self.get_logits(x_NCHW)
        others_NK = logits_NK.scatter(1, y_N[:, None], -torch.inf)
        rivals_NJ = others_NK.topk(min(self.classes, others_NK.shape[1]) - 1).indices
        found_N, led_N = logits_NK.argmax(1), torch.ones_like(y_N, dtype=torch.bool)
        for _ in range(self.steps):
            going = ((found_N == y_N) & led_N).nonzero().flatten()
            if len(going) == 0:
                break
            r_NCHW, led_N[going] = self._step(x_NCHW[going], y_N[going], rivals_NJ[going])
            x_NCHW[going] = (x_NCHW[going] + (1 + self.overshoot) * r_NCHW).clamp(0, 1)
            # A pass without a graph tells who has arrived: they need no backward pass for each class.
            with torch.no_grad():
                found_N[going] = self.get_logits(x_NCHW[going]).argmax(1)
        return x_NCHW, found_N

    def _step(self, x_NCHW: Tensor, y_N: Tensor, rivals_NJ: Tensor) -> tuple[Tensor, Tensor]:
        """Return the step over the nearest linearised boundary, or zero, and whether there is one."""
        x_NCHW = x_NCHW.requires_grad_()
        logits_NK = self.get_logits(x_NCHW)
        f_NJ = logits_NK.gather(1, rivals_NJ) - logits_NK.gather(1, y_N[:, None])
        r_NCHW, nearest_N = torch.zeros_like(x_NCHW), f_NJ.new_full((len(y_N),), torch.inf)
        for j, f_N in enumerate(f_NJ.unbind(1)):
            w_NCHW = slope(f_N, x_NCHW, again=j + 1 < f_NJ.shape[1])
            norm_N = w_NCHW.flatten(1).norm(dim=1)
            distance_N = f_N.detach().abs() / norm_N
            nearer_N = (distance_N < nearest_N) & norm_N.isfinite()  # not so for 0 / 0, that is NaN, nor for 1 / 0
            nearest_N = torch.where(nearer_N, distance_N, nearest_N)
            length_N111, norm_N111 = (t_N[:, None, None, None] for t_N in (distance_N + CROSSING, norm_N))
            r_NCHW = torch.where(nearer_N[:, None, None, None], length_N111 * (w_NCHW / norm_N111), r_NCHW)
        return r_NCHW, nearest_N.isfinite()


class MIM(Tidy, torchattacks.MIFGSM):  # type: ignore[misc]  # torchattacks is not typed
    """The momentum iterative method.

    Mends the stock MIFGSM, which divides by the gradient's mean size (the paper's L1 norm, up to a factor that its
    signs ignore): where a gradient is zero, once, the momentum
    becomes NaN, whose sign is 0, and the image never moves again. Here such a gradient adds nothing and the
    momentum carries on.

    Args:
        eps: bound of the perturbation, L-inf, in pixel units of [0, 1].
        alpha: step size, in the same units.
        decay: what is left of the momentum after a step, mu.

    Source: Dong et al., Boosting Adversarial Attacks with Momentum, 2018, Algorithm 1.
    """

    def __init__(
        self, model: nn.Module, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10, decay: float = 1.0
    ) -> None:
        super().__init__(model, eps, alpha, steps, decay)
        self.attack = "MIM"

    def forward(self, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        x_NCHW, aim_N = self._given(x_NCHW, y_N)
        moved_NCHW, momentum_NCHW = x_NCHW.clone(), torch.zeros_like(x_NCHW)
        for _ in range(self.steps):
            slope_NCHW = self._look(moved_NCHW, aim_N)[0]
            size_N111 = slope_NCHW.abs().mean((1, 2, 3), keepdim=True)
            unit_NCHW = torch.where(size_N111 > 0, slope_NCHW / size_N111, 0)
            momentum_NCHW = self.decay * momentum_NCHW + unit_NCHW
            moved_NCHW = moved_NCHW + self.alpha * momentum_NCHW.sign()
            moved_NCHW = (x_NCHW + (moved_NCHW - x_NCHW).clamp(-self.eps, self.eps)).clamp(0, 1)
        return moved_NCHW
