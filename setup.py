"""Package list only: find the subpackages of every mapped folder, so that none is left out."""

from setuptools import find_packages, setup

FOLDERS = {
    "gsa_platform": "gsa_platform",
    "gsa_platform.conf": "conf",
    "gsa_kernels": "kernels/gsa_kernels",
    "gsa_plugins": "plugins/gsa_plugins",
}

setup(
    packages=[
        name
        for root, folder in FOLDERS.items()
        for name in (root, *(f"{root}.{sub}" for sub in find_packages(folder)))
    ],
    package_dir=FOLDERS,
    package_data={"": ["*.yaml", "*.json", "*.txt", "*.html", "*.css", "*.js", "py.typed"]},
)
