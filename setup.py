from setuptools import find_packages, setup

packages = find_packages(include=["megdet_cli*", "megdet_d2*"])
setup(packages=[*packages, "megdet_d2.configs"], package_dir={"megdet_d2.configs": "configs"})
