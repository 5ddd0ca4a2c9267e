"""Slow fp64 twins of the fast routines, written from the papers and from nothing else.

Letters: `W`, `G = dL/dW` `(out, in)`; `A` `(r, in)`, `B` `(out, r)`; `s` the LoRA scaling; adapted weight `W + s B A`.
Papers: LoRA-GA arXiv 2407.05000, LoRA-One arXiv 2502.01235, LoRA-Pro arXiv 2407.18242, AdamW arXiv 1711.05101.

Every routine here loops over singular pairs, factors or steps, so that it can be read against its paper line by line.
Nothing is imported from `lora_ga_trainer`: no mistake is shared by sharing a line.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def best_rank(G, k):  # G (out, in) -> (out, in)
    """Return the best rank-`k` approximation of `G`: the sum of its `k` strongest rank-one terms (Eckart, Young 1936).

    `k` may exceed `min(out, in)`; then the result is `G` itself, to rounding.
    """
    U, S, Vt = torch.linalg.svd(G.double(), full_matrices=False)
    total = torch.zeros_like(G, dtype=torch.float64)
    for i in range(min(k, len(S))):
        total += S[i] * torch.outer(U[:, i], Vt[i])
    return total


def own_directions(direction, r, m):
    """List the singular directions, counted from 0, that a named split gives to A alone and to B alone.

    LoRA-GA, Theorem 3.1: `I_A`, `I_B` are disjoint, of size `r` each, and together `{1, ..., 2r}`; the theorem leaves
    the choice free, Algorithm 1 takes `ArB2r`. When only `m < 2r` directions exist the same rule deals out those `m`,
    so one or both lists come out shorter than `r`.
    """
    for_A, for_B = [], []
    for i in range(min(2 * r, m)):
        A_takes_it = {"ArB2r": i < r, "A2rBr": i >= r, "ArBr": i % 2 == 1}[direction]
        (for_A if A_takes_it else for_B).append(i)
    return for_A, for_B


def split_directions(direction, r, m):
    """Complete `own_directions` to the halves `I_A`, `I_B`, of size `min(r, m)` each.

    A half that is short borrows the strongest directions of the other one. Which of them it borrows is free: the
    first-step law only needs every direction to be somewhere and the shared ones to be scaled.
    """
    for_A, for_B = own_directions(direction, r, m)
    size = min(r, m)
    I_A = for_A + for_B[: size - len(for_A)]
    I_B = for_B + for_A[: size - len(for_B)]
    return sorted(I_A), sorted(I_B)


def lora_ga_scale_reference(out_features, r, gamma, scale, s, W=None):  # W (out, in)
    """Return `c`, the common length of the rows of A0 and the columns of B0.

    `stable`: `d_out^(1/4) / sqrt(gamma)` (LoRA-GA, Algorithm 1, from the stability of Theorem 3.2). `unit`: 1.
    `gd`: `1/s` (Theorem 3.1 with zeta = 1: the first step is a full gradient step of the same learning rate).
    `matched`: mean squares of the entries of the first sign step, `r c^2 / in + r c^2 / out`, as from plain LoRA,
    whose `A` is uniform up to `1 / sqrt(in)`: r times a third of `1 / in`.
    `weight_svd`: the mean of `sqrt(sigma_i(W) / s)` over the top r (the authors' code; not in the paper).
    """
    if scale == "stable":
        return math.sqrt(math.sqrt(out_features)) / math.sqrt(gamma)
    if scale == "unit":
        return 1.0
    if scale == "gd":
        return 1.0 / s
    if scale == "matched":
        in_features = W.shape[1]
        return math.sqrt((1 / in_features / 3) / (1 / in_features + 1 / out_features))
    if scale == "weight_svd":
        roots = [math.sqrt(float(sigma) / s) for sigma in torch.linalg.svdvals(W.double())][:r]
        return sum(roots) / len(roots)
    raise KeyError(scale)


def lora_ga_reference(G, r, gamma=16.0, direction="ArB2r", scale="stable", s=1.0, W=None):  # -> (out, r), (r, in)
    """Return LoRA-GA's start `B0, A0`: scaled singular vectors of `G` (2407.05000, Theorem 3.1 and Algorithm 1).

    Where `2r > m = min(out, in)` the halves overlap, and a shared direction is scaled by 1/sqrt 2 in both. Where
    `r > m` the rows of A from `m` on, which the package draws at random, are zero here, as are those columns of B.
    `W` is needed by `scale="weight_svd"`. Singular pairs are signed so that the largest entry of each `u` is positive.
    """
    out_features, in_features = G.shape
    U, S, Vt = torch.linalg.svd(G.double(), full_matrices=False)
    for i in range(len(S)):
        largest = max(U[:, i].tolist(), key=abs)
        if largest < 0:
            U[:, i], Vt[i] = -U[:, i], -Vt[i]
    c = lora_ga_scale_reference(out_features, r, gamma, scale, s, W)
    I_A, I_B = split_directions(direction, r, len(S))
    A0 = torch.zeros(r, in_features, dtype=torch.float64)
    B0 = torch.zeros(out_features, r, dtype=torch.float64)
    for row, i in enumerate(I_A):
        A0[row] = (c / math.sqrt(2) if i in I_B else c) * Vt[i]
    for column, i in enumerate(I_B):
        B0[:, column] = (c / math.sqrt(2) if i in I_A else c) * U[:, i]
    return B0, A0


def lora_one_reference(G, r, gamma=128.0):  # -> (out, r), (r, in)
    """Return LoRA-One's start `B0, A0`: one normalised gradient step, at rank r (2502.01235, Algorithm 1).

    `U, S, V = SVD(-G)`; `S <- S / S[0]`; `A0 = sqrt(S_r) V_r^T / sqrt(gamma)`; `B0 = U_r sqrt(S_r) / sqrt(gamma)`.
    Rows of A and columns of B past `min(out, in)` are left zero.
    """
    out_features, in_features = G.shape
    U, S, Vt = torch.linalg.svd(-G.double(), full_matrices=False)
    A0 = torch.zeros(r, in_features, dtype=torch.float64)
    B0 = torch.zeros(out_features, r, dtype=torch.float64)
    for i in range(min(r, len(S))):
        root = math.sqrt(float(S[i] / S[0]) / gamma)
        A0[i] = root * Vt[i]
        B0[:, i] = root * U[:, i]
    return B0, A0


def whiteners_reference(x, dy, w, damping=0.01):  # x (N, in), dy (N, out) -> D_P (out, out), D_Q (in, in)
    """Return `(P + l)^-w` and `(Q + l)^-w`: mean squares by feature, divided by their mean, on a diagonal."""
    diagonals = []
    for rows in (dy.double(), x.double()):
        squares = [sum(float(row[j]) ** 2 for row in rows) / len(rows) for j in range(rows.shape[1])]
        mean = sum(squares) / len(squares)
        diagonals.append(torch.diag(torch.tensor([(v / mean + damping) ** -w for v in squares], dtype=torch.float64)))
    return diagonals


def turned_rows_reference(G, plain):  # G (out, in), plain (r, in) -> (r, in)
    """Return rows along the right singular vectors of `G`, strongest first, as long as the plain ones."""
    rows = torch.zeros_like(plain, dtype=torch.float64)
    _, _, Vt = torch.linalg.svd(G.double())
    for i in range(len(plain)):
        rows[i] = Vt[i] / Vt[i].norm() * plain[i].double().norm()
    return rows


def lora_ga_offset_training(W, B0, A0, s, loss, n, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):  # -> W_eff (out, in)
    """Train LoRA-GA on a changed base and return the net weight after `n` steps.

    The base becomes `W' = W - s B0 A0` (2407.05000, Algorithm 1), the adapter starts at `(B0, A0)`, and both factors
    are moved by AdamW (1711.05101, Algorithm 2) with weight decay 0 and `eps` where torch puts it, added to the
    corrected square root.

    Args:
        loss: takes the net weight `W' + s B A` (fp64, part of a graph), returns a scalar. Called once a step, in
            order, so it may walk through batches.
    """
    W, B0, A0 = W.double(), B0.double(), A0.double()
    base = W - s * B0 @ A0
    factors = [B0.clone(), A0.clone()]
    first = [torch.zeros_like(p) for p in factors]
    second = [torch.zeros_like(p) for p in factors]
    beta1, beta2 = betas
    for t in range(1, n + 1):
        B, A = (p.clone().requires_grad_(True) for p in factors)
        gradients = torch.autograd.grad(loss(base + s * B @ A), [B, A])
        for i, g in enumerate(gradients):
            first[i] = beta1 * first[i] + (1 - beta1) * g
            second[i] = beta2 * second[i] + (1 - beta2) * g * g
            corrected_first = first[i] / (1 - beta1**t)
            corrected_second = second[i] / (1 - beta2**t)
            factors[i] = factors[i] - lr * corrected_first / (corrected_second.sqrt() + eps)
    B, A = factors
    return base + s * B @ A


def projection_B(B):  # B (out, r) -> P_B (out, out)
    """Return the orthogonal projection onto the column space of `B`, also when its columns are dependent or zero."""
    return B.double() @ torch.linalg.pinv(B.double())


def projection_A(A):  # A (r, in) -> P_A (in, in)
    """Return the orthogonal projection onto the row space of `A`, also when its rows are dependent or zero."""
    return torch.linalg.pinv(A.double()) @ A.double()


def lora_pro_reference(A, B, G, s):  # A (r, in), B (out, r), G (out, in) -> (out, in)
    """Return the equivalent gradient `s (B dA + dB A)` nearest to `G` (2407.18242, the problem of Theorem 2.1).

    The theorem's closed form is not used. With row-major vec and x the Kronecker product,
    `vec(B dA) = (B x I) vec(dA)` and `vec(dB A) = (I x A^T) vec(dB)`: one linear least-squares system.
    Its `dA` and `dB` are not unique (that is the theorem's X), the gradient they make is.
    """
    A, B, G = A.double(), B.double(), G.double()
    r, in_features = A.shape
    out_features = B.shape[0]
    of_dA = torch.kron(B, torch.eye(in_features, dtype=torch.float64))
    # A real copy: for r = 1, `contiguous()` leaves strides that kron refuses.
    A_T = A.T.clone(memory_format=torch.contiguous_format)
    of_dB = torch.kron(torch.eye(out_features, dtype=torch.float64), A_T)
    system = s * torch.cat([of_dA, of_dB], dim=1)
    # The system never has full column rank, so the solver must be one that survives that: gelsd works by SVD.
    solution = torch.linalg.lstsq(system, G.reshape(-1, 1), driver="gelsd").solution.reshape(-1)
    dA = solution[: r * in_features].reshape(r, in_features)
    dB = solution[r * in_features :].reshape(out_features, r)
    return s * (B @ dA + dB @ A)


def shortest_length(A):  # A (r, in) -> float
    """Return the length of `A` in its shortest direction, without those in which it has none."""
    lengths = torch.linalg.svdvals(A.double()).tolist()
    return min((length for length in lengths if length > 1e-6 * lengths[0]), default=0.0)


def soft_projection_B(A, B):  # A (r, in), B (out, r) -> H (out, out)
    """Return the projection onto the columns of `B`, weaker where `B` is shorter than `A` at its shortest.

    Not of the paper: a singular direction of length `l` counts with `min(1, (l / a)^2)`.
    """
    a = shortest_length(A)
    U, lengths, _ = torch.linalg.svd(B.double(), full_matrices=False)
    H = torch.zeros(len(B), len(B), dtype=torch.float64)
    for i, length in enumerate(lengths.tolist()):
        if length > 1e-9 * a and length > 1e-6 * float(lengths[0]):
            H += (1.0 if length >= a else (length / a) ** 2) * torch.outer(U[:, i], U[:, i])
    return H


def lora_pro_damped_reference(A, B, G):  # A (r, in), B (out, r), G (out, in) -> (out, in)
    """Return the step `H G + (I - H) G P_A`: that of Theorem 2.1 with the soft projection in place of `P_B`."""
    H = soft_projection_B(A, B)
    return H @ G.double() + (G.double() - H @ G.double()) @ projection_A(A)


def lora_pro_correction_reference(A, B, gA, gB, s):  # (r, in), (out, r), (r, in), (out, r) -> dA, dB
    """Return the corrected gradients of Theorem 2.1 with the `X` nearest to `gA`, `gB`, for an `A` of full rank.

    The inverse of `B^T B` takes no direction of `B` as shorter than `A` at its shortest (not of the paper).
    `X` makes `|dA - gA|^2 + |dB - gB|^2` least (the paper's Theorem 2.3): its derivative there is
    `(dA - gA) A^T - B^T (dB - gB) = 0`. That is `B^T B X + X A A^T = C`, solved as one linear system: with row-major
    vec, `vec(M X) = (M x I) vec(X)` and `vec(X N) = (I x N^T) vec(X)`.
    """
    r = A.shape[0]
    gram_B, gram_A = B.T @ B, A @ A.T
    squares, V = torch.linalg.eigh(gram_B)
    inverse_B = torch.zeros_like(gram_B)
    for i in range(r):
        inverse_B += torch.outer(V[:, i], V[:, i]) / max(float(squares[i]), shortest_length(A) ** 2)
    dA = inverse_B @ gA / s**2
    dB = (gB - B @ inverse_B @ B.T @ gB) @ torch.linalg.inv(gram_A) / s**2
    identity = torch.eye(r, dtype=torch.float64)
    C = B.T @ (dB - gB) - (dA - gA) @ A.T
    system = torch.kron(gram_B, identity) + torch.kron(identity, gram_A)
    X = torch.linalg.solve(system, C.reshape(-1)).reshape(r, r)
    return dA + X @ A, dB - B @ X


def lora_pro_adamw_reference(A, B, gradients, s, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):  # -> A, B
    """Walk LoRA-Pro's AdamW (2407.18242, Algorithm 1), with weight decay on the net update `s B A`.

    Args:
        gradients: called with `(A, B)`, returns `gA, gB`. Called once a step, as often as it yields something.
    """
    beta1, beta2 = betas
    first = second = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)
    t = 0
    while (found := gradients(A, B)) is not None:
        t += 1
        dA, dB = lora_pro_correction_reference(A, B, *found, s)
        equivalent = s * (B @ dA + dB @ A)
        first = beta1 * first + (1 - beta1) * equivalent
        second = beta2 * second + (1 - beta2) * equivalent**2
        step = first / (1 - beta1**t) / ((second / (1 - beta2**t)).sqrt() + eps)
        step = step + weight_decay * s * B @ A
        dA, dB = lora_pro_correction_reference(A, B, s * B.T @ step, s * step @ A.T, s)
        A, B = A - lr * dA, B - lr * dB
    return A, B


def whole_sample_gradient(
    model: torch.nn.Module, names: list[str], loss: Callable[[], Tensor]
) -> dict[str, Tensor]:  # name -> (out, in), fp64
    """
    Compute `dL/dW` of the named weights by one `autograd.grad` of the loss of the whole sample.

    `loss` must be the mean over all items of the sample, computed in a single forward pass of `model` (a plain model
    without an adapter). Weights of `Conv1D` layers, stored as `(in, out)`, are returned transposed.
    """
    modules = dict(model.named_modules())
    weights = [modules[name].weight for name in names]
    for weight in weights:
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(loss(), weights)
    return {
        name: (gradient.T if type(modules[name]).__name__ == "Conv1D" else gradient).double()
        for name, gradient in zip(names, gradients, strict=True)
    }


def whole_sample_parameter_gradient(
    model: torch.nn.Module, names: list[str], loss: Callable[[], Tensor]
) -> dict[str, Tensor]:  # name -> (E, out, in), fp64
    """
    Compute `dL/dW` of the named fused expert parameters by one `autograd.grad` of the loss of the whole sample.

    Parameters that the model stores as `(E, in, out)` (its experts module says `is_transposed`) are returned as
    `(E, out, in)`.
    """
    weights = {name: model.get_parameter(name) for name in names}
    for weight in weights.values():
        weight.requires_grad_(True)
    found = {}
    for name, gradient in zip(names, torch.autograd.grad(loss(), list(weights.values())), strict=True):
        owner = model.get_submodule(name.rpartition(".")[0])
        found[name] = (gradient.transpose(1, 2) if owner.is_transposed else gradient).double()
    return found


def layer_inputs_and_output_gradients(
    model: torch.nn.Module, names: list[str], loss: Callable[[], Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:  # name -> x (N, in), dy (N, out)
    """
    Return what goes into the named layers and `dL/dy` of what comes out, of one pass of the summed loss of the sample.

    `model` is a plain model without an adapter, and each layer is called once.
    """
    modules, seen = dict(model.named_modules()), {}

    def keep(name):
        def hook(module, args, y):
            y.retain_grad()
            seen[name] = (args[0], y)

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    loss().backward()
    for handle in handles:
        handle.remove()
    return {name: (x.detach().flatten(0, -2), y.grad.flatten(0, -2)) for name, (x, y) in seen.items()}


def completed_from_sketches(Omega, Psi, Y, Z, m):  # (in, k), (out, k), (out, k), (in, k) -> (out, in)
    """Complete what sketches `Y = G Omega`, `Z = G^T Psi` tell of `G` to a matrix, the generalised Nystrom way.

    What lies in the row space of `Omega` is `Y Omega^+`, what lies in the column space of `Psi` is `(Z Psi^+)^T`. The
    rest is completed as if `G` had rank `m` (Nakatsukasa, arXiv 2009.11392, equation 1.1, `G X (Y^T G X)^+ Y^T G` with
    a truncated pseudo-inverse, restricted to both complements).
    """
    Omega, Psi, Y, Z = (matrix.double() for matrix in (Omega, Psi, Y, Z))
    in_Omega, in_Psi = Omega @ torch.linalg.pinv(Omega), Psi @ torch.linalg.pinv(Psi)  # orthogonal projectors
    outside_Omega, outside_Psi = torch.eye(len(Omega)).double() - in_Omega, torch.eye(len(Psi)).double() - in_Psi
    GT = Y @ torch.linalg.pinv(Omega)  # G in_Omega
    LG = (Z @ torch.linalg.pinv(Psi)).T  # in_Psi G
    U, S, Vt = torch.linalg.svd(in_Psi @ GT)
    inverse = torch.zeros_like(GT.T)
    for i in range(m):
        inverse += torch.outer(Vt[i], U[:, i]) / S[i]
    return in_Psi @ GT + outside_Psi @ GT + LG @ outside_Omega + outside_Psi @ GT @ inverse @ LG @ outside_Omega


def hypercomplex_weight(rules, s, t):  # (n, n, n), (n, out / n, 1), (n, 1, in / n) -> (out, in)
    """Return the sum of Kronecker products of Compacter (arXiv 2106.04647, equations 4 and 5)."""
    return sum(torch.kron(rule.double(), a.double() @ b.double()) for rule, a, b in zip(rules, s, t, strict=True))


def tensor_of_changes(left, cores, right):  # (out, r), (L, r, r), (r, in) -> (L, out, in)
    """Return the changes of L layers that share their outer factors, entry by entry (arXiv 2402.01376)."""
    changes = torch.zeros(len(cores), left.shape[0], right.shape[1], dtype=torch.float64)
    for layer, core in enumerate(cores.double()):
        for a in range(core.shape[0]):
            for b in range(core.shape[1]):
                changes[layer] += core[a, b] * torch.outer(left[:, a].double(), right[b].double())
    return changes


def intruder_reference(W, D, k, eps):  # W, D (out, in) -> [(j, s_j, u_j (out,), v_j (in,), similarity)]
    """List the top `k` singular triplets of `W + D` with `max_i |u_j . u0_i|` over all left vectors `u0_i` of `W`.

    An intruder has a similarity below `eps` (arXiv 2410.21228); the others are listed beside them.
    """
    U0, _, _ = torch.linalg.svd(W.double(), full_matrices=False)
    U, S, Vt = torch.linalg.svd(W.double() + D.double(), full_matrices=False)
    found = []
    for j in range(min(k, len(S))):
        similarity = max(abs(float(U[:, j] @ U0[:, i])) for i in range(U0.shape[1]))
        found.append((j, float(S[j]), U[:, j], Vt[j], similarity))
    return found


def without_intruders_reference(W, D, k, eps, strength):  # W, D (out, in) -> W' (out, in)
    """Scale intruders down: `W' = W + D + (strength - 1) sum_j s_j u_j v_j^T` (arXiv 2410.21228)."""
    total = W.double() + D.double()
    for _, s, u, v, similarity in intruder_reference(W, D, k, eps):
        if similarity < eps:
            total += (strength - 1) * s * torch.outer(u, v)
    return total


def share_inside_reference(D, U):  # D (out, in), U (out, m), orthonormal columns -> float
    """Return the share of the energy of `D` whose outputs lie in the span of `U`, column by column."""
    inside = sum(float((U[:, i].double() @ D.double()).square().sum()) for i in range(U.shape[1]))
    return inside / float(D.double().square().sum())


def rank_figures_reference(D):  # D (out, in) -> stable rank, effective rank
    """Return `||D||_F^2 / ||D||_2^2` and `exp` of the entropy of the normalised singular values (Roy 2007)."""
    S = [float(value) for value in torch.linalg.svdvals(D.double())]
    entropy = -sum(value / sum(S) * math.log(value / sum(S)) for value in S if value > 1e-12 * S[0])
    return sum(value**2 for value in S) / S[0] ** 2, math.exp(entropy)


def polar_reference(M):  # (r, n) -> (r, n)
    """Return the polar factor of `M`: the sum of `u v^T` over its singular pairs of a length above 0."""
    U, lengths, Vt = torch.linalg.svd(M.double(), full_matrices=False)
    total = torch.zeros_like(M, dtype=torch.float64)
    for i, length in enumerate(lengths.tolist()):
        if length > 1e-6 * float(lengths[0]):
            total += torch.outer(U[:, i], Vt[i])
    return total


def adam_reference(gradients, betas=(0.9, 0.999), eps=1e-8):  # list of (r, n) -> list of steps of rate 1
    """Walk Adam (1412.6980, Algorithm 1)."""
    first = second = torch.zeros_like(gradients[0], dtype=torch.float64)
    steps = []
    for t, g in enumerate(gradients, 1):
        first = betas[0] * first + (1 - betas[0]) * g
        second = betas[1] * second + (1 - betas[1]) * g**2
        steps.append(first / (1 - betas[0] ** t) / ((second / (1 - betas[1] ** t)).sqrt() + eps))
    return steps


def root_by_svd(C, power):  # (r, r) -> (r, r)
    """Return a power of a symmetric positive matrix."""
    U, values, Vt = torch.linalg.svd(C.double())
    return sum(value**power * torch.outer(U[:, i], Vt[i]) for i, value in enumerate(values.tolist()))


def polora_reference(A, B, M_A, M_B, P, Q):  # (r, in), (out, r), (r, in), (out, r), (out,), (in,) -> dA, dB
    """Return PoLoRA's steps of rate 1 (2607.17620) from the momenta and the diagonals `P` of `dy`, `Q` of `x`."""
    P, Q = torch.diag(P.double()), torch.diag(Q.double())
    of_B, of_A = root_by_svd(B.T @ P @ B, -0.5), root_by_svd(A @ Q @ A.T, -0.5)
    of_P, of_Q = root_by_svd(P, -0.5), root_by_svd(Q, -0.5)
    D_A = of_B @ polar_reference(of_B @ M_A @ of_Q) @ of_Q
    D_B = of_P @ polar_reference(of_P @ M_B @ of_A) @ of_A
    norm = lambda M: float(torch.linalg.svdvals(M)[0])
    length = norm(A) + norm(B)
    return D_A / norm(D_A) / length, D_B / norm(D_B) / length


def frozen_A_training(W, A, s, loss, n, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):  # W (out, in), A (r, in) -> W_eff
    """Train `B` alone from 0 by Adam on the weight `W + s B A`, its gradient written as `s G A^T` with `G = dL/dW`."""
    W, A = W.double(), A.double()
    B = torch.zeros(W.shape[0], A.shape[0], dtype=torch.float64)
    first, second = torch.zeros_like(B), torch.zeros_like(B)
    for t in range(1, n + 1):
        weight = (W + s * B @ A).requires_grad_(True)
        (G,) = torch.autograd.grad(loss(weight), [weight])
        g = s * G @ A.T
        first = betas[0] * first + (1 - betas[0]) * g
        second = betas[1] * second + (1 - betas[1]) * g * g
        B = B - lr * (first / (1 - betas[0] ** t)) / ((second / (1 - betas[1] ** t)).sqrt() + eps)
    return W + s * B @ A
