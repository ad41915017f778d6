"""Ten of the fifteen common corruptions (Hendrycks & Dietterich 2019), of whole batches of uint8 images (n, 3, H, H).

Their parameters are the benchmark's: those of CIFAR-10-C up to 64 pixels, those of ImageNet-C above. The other five
need what torch does not have: a loop over pixels and ImageMagick (glass and motion blur), or pictures of frost, and
plasma (snow, frost and fog).
"""

import io
import math

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from common.images import SMALL_SIZE

NAMES = (  # the fifteen of the benchmark
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)
SMALL = {  # by severity 1 to 5, for images up to 64 pixels
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "zoom_blur": ((7, 0.01), (12, 0.01), (16, 0.01), (21, 0.01), (26, 0.01)),  # the lengths of its float ranges
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "elastic_transform": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg_compression": (80, 65, 58, 50, 40),
}
LARGE = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "shot_noise": (60, 25, 12, 5, 3),
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "zoom_blur": ((12, 0.01), (16, 0.01), (11, 0.02), (13, 0.02), (11, 0.03)),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "elastic_transform": ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    "jpeg_compression": (25, 18, 15, 10, 7),
}
MADE = tuple(name for name in NAMES if name in SMALL)


def gaussian_noise(x, c, g):
    return x + c * torch.randn(x.shape, generator=g)


def shot_noise(x, c, g):
    return torch.poisson(x * c, generator=g) / c


def impulse_noise(x, c, g):
    """Turns a share c of the pixels of each channel white or black."""
    hit, white = torch.rand(x.shape, generator=g) < c, torch.rand(x.shape, generator=g) < 0.5
    return torch.where(hit, white.float(), x)


def defocus_blur(x, c, g):
    """Blurs with a disk of radius c[0], which a small Gaussian of deviation c[1] has smoothed."""
    radius, sigma = c
    reach, smooth = (8, 1) if radius <= 8 else (radius, 2)
    offset = torch.arange(-reach, reach + 1.0)
    disk = ((offset[:, None] ** 2 + offset**2) <= radius**2).float()
    gauss = (-0.5 * (torch.arange(-smooth, smooth + 1.0) / sigma) ** 2).exp()
    gauss = gauss / gauss.sum()
    disk = F.pad((disk / disk.sum())[None, None], [smooth] * 4, mode="reflect")
    kernel = F.conv2d(disk, (gauss[:, None] * gauss)[None, None])
    padded = F.pad(x, [reach] * 4, mode="reflect")
    return F.conv2d(padded, kernel.expand(3, 1, -1, -1), groups=3)


def zoom_blur(x, c, g):
    """The mean of the image and of c[0] enlargements of its middle, by 1, 1 + c[1], 1 + 2 c[1], ..."""
    count, step = c
    H = x.shape[-1]
    total = x.clone()
    for k in range(count):
        zoom = 1 + k * ((1 + step) - 1)  # as np.arange has it: a last bit can decide over a row of pixels
        part = math.ceil(H / zoom)
        top = (H - part) // 2
        size = round(part * zoom)
        middle = x[..., top : top + part, top : top + part]
        enlarged = F.interpolate(middle, size=(size, size), mode="bilinear", align_corners=True)
        trim = (size - H) // 2
        total += enlarged[..., trim : trim + H, trim : trim + H]
    return total / (count + 1)


def brightness(x, c, g):
    """Raises the value of HSV by c; hue and saturation stay."""
    value = x.amax(1, keepdim=True)
    raised = (value + c).clamp(max=1)
    return torch.where(value > 0, x * raised / value.clamp(min=1e-6), raised)


def contrast(x, c, g):
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * c + mean


def elastic_transform(x, c, g):
    """Moves three corners by up to c[2] H, and then all pixels by c[0] H at random, smoothed over c[1] H."""
    n, _, H, _ = x.shape
    unit = H if H <= SMALL_SIZE else H * 244 / 224  # the benchmark says 244 at 224 pixels
    alpha, sigma, shift = (v * unit for v in c)
    middle, third = H // 2, H // 3
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]) * third + middle
    moved = corners + shift * (2 * torch.rand(n, 3, 2, generator=g) - 1)
    ones = torch.ones(n, 3, 1)
    back = torch.linalg.solve(torch.cat([moved, ones], 2), corners.expand(n, 3, 2))  # (n, 3, 2): from output to input
    axis = torch.arange(H, dtype=torch.float32)
    pixel = torch.stack([axis.expand(H, H), axis[:, None].expand(H, H), torch.ones(H, H)], 2)  # x, y, 1
    x = sample(x, pixel.view(1, -1, 3) @ back, about_centres=True)
    noise = 2 * torch.rand(n, 2, H, H, generator=g) - 1
    weights = gaussian_rows(H, sigma)
    displaced = alpha * (weights @ noise @ weights.T)  # (n, 2, H, H)
    return sample(x, pixel[None, :, :, :2].flatten(1, 2) + displaced.flatten(2).transpose(1, 2), about_centres=False)


def sample(x, places, about_centres):
    """x (n, 3, H, H) at `places` (n, H^2, 2), columns and rows in pixels, interpolated linearly.

    Beyond the image it is mirrored, about the centres of the outermost pixels or about their edges.
    """
    H = x.shape[-1]
    grid = 2 * places / (H - 1) - 1 if about_centres else (2 * places + 1) / H - 1
    return F.grid_sample(x, grid.view(len(places), H, H, 2), padding_mode="reflection", align_corners=about_centres)


def gaussian_rows(size, sigma):
    """(size, size): row i weighs the pixels about i by a Gaussian cut off at 3 sigma, reflected at the edges."""
    reach = int(3 * sigma + 0.5)
    offset = torch.arange(-reach, reach + 1)
    kernel = (-0.5 * (offset / max(sigma, 1e-6)) ** 2).exp()
    source = (torch.arange(size)[:, None] + offset) % (2 * size)
    source = torch.where(source < size, source, 2 * size - 1 - source)
    return torch.zeros(size, size).scatter_add_(1, source, (kernel / kernel.sum()).expand(size, -1))


def pixelate(images, c):
    """Shrinks and enlarges by Pillow's box filter."""
    H = images.shape[-1]
    small = int(images.shape[-1] * c)
    box = {"interpolation": InterpolationMode.BOX}

    def one(image):
        shrunk = TF.resize(TF.to_pil_image(image), [small, small], **box)
        return TF.pil_to_tensor(TF.resize(shrunk, [H, H], **box))

    return torch.stack([one(image) for image in images])


def jpeg_compression(images, c):
    """Sends the images through JPEG files of quality c."""

    def one(image):
        file = io.BytesIO()
        TF.to_pil_image(image).save(file, "JPEG", quality=c)
        return TF.pil_to_tensor(Image.open(file))

    return torch.stack([one(image) for image in images])


OF_FLOATS = {  # functions of images in [0, 1], parameters, and a generator
    "gaussian_noise": gaussian_noise, "shot_noise": shot_noise, "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur, "zoom_blur": zoom_blur, "brightness": brightness, "contrast": contrast,
    "elastic_transform": elastic_transform,
}
OF_BYTES = {"pixelate": pixelate, "jpeg_compression": jpeg_compression}  # of uint8 images, and a parameter


def corrupt(images, name, severity, g, as_files=True):
    """images (n, 3, H, H) uint8 under the corruption `name` at severity 1 to 5, drawn from the generator g.

    ImageNet-C's files are JPEGs of quality 85, which weakens its noises by a third. So images above 64 pixels pass
    through one too, unless as_files is False.
    """
    is_small = images.shape[-1] <= SMALL_SIZE
    parameters = (SMALL if is_small else LARGE)[name][severity - 1]
    if name in OF_BYTES:
        corrupted = OF_BYTES[name](images, parameters)
    else:
        x = OF_FLOATS[name](images.float() / 255, parameters, g)
        corrupted = (x.clamp(0, 1) * 255).to(torch.uint8)  # cut off, not rounded, as the benchmark's files are
    return jpeg_compression(corrupted, 85) if as_files and not is_small else corrupted
