"""Heat maps of what decided a prediction: Grad-CAM (Selvaraju et al. 2017)."""
import cv2
import numpy as np
import torch
import torch.nn.functional as F


@torch.enable_grad()
def grad_cam(model, image, label):
    """Return how much each place of a photo supports a class.

    The feature maps of a layer are weighted by the mean gradient of the class's logit, summed, and
    cut off below 0. The layer is the last one with a height and width on which the logit depends:
    in a ViT the first one of the last block, since later only the class token counts.

    Args:
        model: in evaluation mode.
        image: normalized photo (1, 3, H, W), on the model's device.
        label: the class, 0..17.

    Returns:
        float array (H, W) from 0 to 1; None if no layer has a height and width that we know.
    """
    outputs = []
    hooks = [layer.register_forward_hook(lambda layer, inputs, output: outputs.append(output))
             for layer in model.modules()]
    try:
        logit = model(image.detach().requires_grad_())[0, label]
    finally:
        for hook in hooks:
            hook.remove()
    for output in reversed(outputs):
        maps = _feature_maps(model, output)
        if maps is None:
            continue
        gradient, = torch.autograd.grad(logit, output, retain_graph=True, allow_unused=True)
        if gradient is None or not (gradient := _feature_maps(model, gradient)).any():
            continue
        heat = (gradient.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1, keepdim=True).relu()
        heat = F.interpolate(heat, image.shape[2:], mode="bilinear", align_corners=False)[0, 0]
        return (heat / heat.max().clamp(min=1e-12)).detach().float().cpu().numpy()
    return None


def _feature_maps(model, output):
    """Return a layer's output as maps (1, C, h, w), h * w > 1, or None if it has none."""
    if not torch.is_tensor(output) or len(output) != 1:
        return None
    channels = getattr(model, "num_features", None)
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid and hasattr(model, "num_prefix_tokens"):  # a ViT: (1, tokens, C)
        first = output.shape[1] - grid[0] * grid[1] if output.dim() == 3 else -1
        if first < 0 or output.shape[2] != channels:
            return None
        output = output[:, first:].transpose(1, 2).unflatten(2, grid)
    if output.dim() != 4:
        return None
    if output.shape[3] == channels != output.shape[1]:  # a Swin: (1, h, w, C)
        output = output.permute(0, 3, 1, 2)
    return output if output.shape[2] * output.shape[3] > 1 else None


def overlay(image, heat, height=384):
    """Return a photo (H, W, 3) with a heat map (H, W) of 0..1 over it, enlarged to a height."""
    colors = cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_TURBO)[:, :, ::-1]
    mixed = cv2.addWeighted(image, 0.55, np.ascontiguousarray(colors), 0.45, 0)
    return cv2.resize(mixed, (round(height * mixed.shape[1] / mixed.shape[0]), height))
