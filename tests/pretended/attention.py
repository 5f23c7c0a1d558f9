"""torch's memory-efficient attention on the pretended device: plain fp32 operations on the CPU.

One launch forward and two backward, as on a card. Dropout is decided by a seed from the device's
generator, which the forward op hands to the backward one.
"""

import torch

CAUSAL_FROM_TOP, CAUSAL_FROM_BOTTOM = 1, 2  # custom_mask_type; 0 is none


def _keep(shape, p, seed):
    """What dropout leaves, scaled; None without dropout."""
    if p == 0:
        return None
    draw = torch.Generator().manual_seed(int(seed))
    return (torch.rand(shape, generator=draw) >= p).float() / (1 - p)


def _refused(query, key, value, has_bf16):
    """What the kernel would say against these (B, L, H, D) tensors, or None."""
    types = {query.dtype, key.dtype, value.dtype}
    allowed = {torch.float16, torch.float32} | ({torch.bfloat16} if has_bf16 else set())
    if len(types) > 1 or not types <= allowed:
        return f"no kernel for {', '.join(map(str, types))} on this card"
    if any(each.stride(-1) != 1 for each in (query, key, value)):
        return "query, key and value must be contiguous in their last dimension"
    if query.shape[-1] % 4:
        return "cutlassF: no kernel found to launch!"
    return None


def _block_bias(shape, cu_query, cu_key, mask_type):
    """fp32 (L, S), -inf where a window must not look; or None."""
    length, size = shape
    bias = None
    if cu_query is not None:
        rows = torch.bucketize(torch.arange(length), cu_query[1:], right=True)
        columns = torch.bucketize(torch.arange(size), cu_key[1:], right=True)
        bias = torch.zeros(shape).masked_fill_(rows[:, None] != columns, -torch.inf)
    if mask_type:
        shift = size - length if mask_type == CAUSAL_FROM_BOTTOM else 0
        later = torch.arange(size) > torch.arange(length)[:, None] + shift
        bias = (torch.zeros(shape) if bias is None else bias).masked_fill_(later, -torch.inf)
    return bias


def _weights(query, key, bias, scale):
    """softmax(scale * query @ key^T + bias) in fp32, and the log of its sums."""
    scores = scale * query.float() @ key.float().mT
    for each in bias:
        scores = scores if each is None else scores + each.float()
    return torch.softmax(scores, -1), torch.logsumexp(scores, -1)


def _scale(query, scale):
    return query.shape[-1] ** -0.5 if scale is None else scale


def _forward(query, key, value, bias, p, scale, seed):
    """(B, H, L, D) thrice to (B, H, L, D) and the log of the sums (B, H, L)."""
    weights, log_sum = _weights(query, key, bias, _scale(query, scale))
    keep = _keep(weights.shape, p, seed)
    out = (weights if keep is None else weights * keep) @ value.float()
    return out.to(query.dtype), log_sum


def _backward(grad, query, key, value, bias, p, scale, seed):
    """The gradients of query, key and value."""
    scale = _scale(query, scale)
    weights, _ = _weights(query, key, bias, scale)
    keep = _keep(weights.shape, p, seed)
    grad_weights = grad.float() @ value.float().mT
    kept = weights
    if keep is not None:
        kept, grad_weights = weights * keep, grad_weights * keep
    grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True))
    grads = (
        scale * grad_scores @ key.float(),
        scale * grad_scores.mT @ query.float(),
        kept.mT @ grad.float(),
    )
    return [each.to(query.dtype) for each in grads]


def _as_kernel(tensor):
    """(B, H, L, D) in memory as the kernel leaves it: (B, L, H, D)."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


class Attention:
    """The four ops, for tensors in the CPU's memory. seed: of a call, from the generator."""

    def __init__(self, has_bf16):
        self.has_bf16 = has_bf16

    def _check(self, *tensors):
        if refused := _refused(*tensors, self.has_bf16):
            raise RuntimeError(f"memory-efficient attention: {refused}")

    def sdpa(self, query, key, value, bias, log_sum, p=0.0, is_causal=False, *, scale=None):
        self._check(query, key, value)
        seed = torch.randint(2**62, ())
        causal = _block_bias((query.shape[2], key.shape[2]), None, None, int(is_causal))
        out, sums = _forward(query, key, value, [bias, causal], p, scale, seed)
        return _as_kernel(out), sums, seed, torch.zeros_like(seed)

    def sdpa_backward(
        self, grad, query, key, value, bias, out, log_sum, seed, offset, p, wanted,
        is_causal=False, *, scale=None,
    ):  # fmt: skip
        causal = _block_bias((query.shape[2], key.shape[2]), None, None, int(is_causal))
        grads = _backward(grad, query, key, value, [bias, causal], p, scale, seed)
        return *map(_as_kernel, grads), None

    def packed(
        self, query, key, value, bias, cu_query, cu_key, most_query, most_key, p, mask_type,
        log_sum=False, *, scale=None, seqlen_k=None, window_size=None,
    ):  # fmt: skip
        """(B, L, H, D) thrice; with cumulative lengths, int32 (windows + 1,), B is 1."""
        self._check(query, key, value)
        if cu_query is not None:
            if query.shape[0] != 1:
                raise RuntimeError("cu_seqlens only supports batch_size=1")
            if not cu_query.dtype == cu_key.dtype == torch.int32:
                raise RuntimeError("cu_seqlens must be int32")
            if max(cu_query.diff().tolist()) > most_query or max(cu_key.diff().tolist()) > most_key:
                raise RuntimeError("max_seqlen is less than a window: its end would not be read")
        seed = torch.randint(2**62, ())
        blocks = _block_bias((query.shape[1], key.shape[1]), cu_query, cu_key, mask_type)
        heads_first = [each.transpose(1, 2) for each in (query, key, value)]
        out, sums = _forward(*heads_first, [bias, blocks], p, scale, seed)
        most = most_query or query.shape[1], most_key or key.shape[1]
        return out.transpose(1, 2).contiguous(), sums, seed, torch.zeros_like(seed), *most

    def packed_backward(
        self, grad, query, key, value, bias, out, cu_query, cu_key, most_query, most_key, log_sum,
        p, seed, offset, mask_type, bias_learns, *, scale=None, num_splits_key=None,
        window_size=None, shared_storage_dqdkdv=False,
    ):  # fmt: skip
        blocks = _block_bias((query.shape[1], key.shape[1]), cu_query, cu_key, mask_type)
        heads_first = [each.transpose(1, 2) for each in (grad, query, key, value)]
        if cu_query is not None:
            seed = seed + 1  # as torch's kernel, whose backward pass draws another dropout
        grads = _backward(*heads_first, [bias, blocks], p, scale, seed)
        return *(each.transpose(1, 2).contiguous() for each in grads), None

    def table(self):
        """Name of an op -> how it is computed, and how many kernels that launches."""
        return {
            "_scaled_dot_product_efficient_attention": (self.sdpa, 1),
            "_scaled_dot_product_efficient_attention_backward": (self.sdpa_backward, 2),
            "_efficient_attention_forward": (self.packed, 1),
            "_efficient_attention_backward": (self.packed_backward, 2),
        }
