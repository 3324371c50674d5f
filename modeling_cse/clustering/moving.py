# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Moving averages: centroids follow their members between fits (the paper's drift rule)."""

import numpy as np
import torch

from ..routing_cse import ClusterRouter
from .algorithms import check_finite
from .discriminant import Discriminant


@torch.no_grad()
def move_clusters(
    router: ClusterRouter, discriminant: Discriminant, embeddings: torch.Tensor, decay: float
) -> Discriminant:
    """
    One step of c <- decay * c + (1 - decay) * v for all sequences of an optimizer step at once: n sequences with mean
    v move a centroid by 1 - decay ** n, which does not depend on their order. Radii follow in the same way, and the
    discriminant in closed form: its class means move with the centroids, its covariance stays.

    Args:
        router: written in place.
        discriminant: as it was fitted or last moved.
        embeddings: (N, d) fp32 of the step's sequences.
        decay: weight of the past for one sequence, 0 to 1.

    Returns:
        The moved discriminant.

    Raises:
        ValueError: embeddings that are not finite; nothing has moved then.
    """
    count = router.num_clusters
    check_finite(embeddings.numpy())
    embeddings = embeddings.to(router.centroids.device)
    # unused rows come last, and none of them may win
    nearest = router.nearness(embeddings)[:, :count].argmax(-1)
    members = torch.bincount(nearest, minlength=count).double()
    weight = 1.0 - decay**members
    distance = (embeddings.double() - router.centroids.double()[nearest]).norm(dim=-1)
    sums = embeddings.new_zeros(count, embeddings.shape[1], dtype=torch.float64).index_add(
        0, nearest, embeddings.double()
    )
    present = members > 0
    old = router.centroids[:count].double()
    shift = torch.where(present.unsqueeze(1), weight.unsqueeze(1) * (sums / members.unsqueeze(1) - old), 0.0)
    radii = router.radii[:count].double()
    mean_distance = torch.zeros_like(radii).index_add(0, nearest, distance) / members
    router.centroids[:count] = (old + shift).float()
    router.radii[:count] = torch.where(present, radii + weight * (mean_distance - radii), radii).float()
    moved = discriminant.moved(shift.cpu().numpy().astype(np.float64))
    rows, bias = moved.weights()
    router.discriminant_weight[:count] = torch.from_numpy(rows).to(router.discriminant_weight)
    router.discriminant_bias[:count] = torch.from_numpy(bias).to(router.discriminant_bias)
    return moved
