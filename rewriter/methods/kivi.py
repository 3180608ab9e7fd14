"""KIVI: keys per channel over groups of 32 tokens, values per token, the newest rows exact. No calibration.

Source     arXiv 2402.02750 and its released code
Differs    see `source.differs`
"""

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Claim, Method, Paper, register_method

_TABLE = "arXiv 2402.02750, tables of CoQA, TruthfulQA and GSM8K"

KIVI = register_method(
    Method(
        name="kivi",
        summary="keys per channel over 32 tokens, values per token, up to 128 recent rows exact",
        source=Paper(
            "2402.02750",
            "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
            "ICML 2024",
            code="jy-yuan/KIVI",
            differs=(
                "a constant group is read as its value; the released code divides by its step of zero",
                "codes are made with the step and minimum after they are rounded to float16",
                "padding is left out of the ranges; the release takes it in",
                "later chunks of several tokens attend to what is stored; the release expects one prefill",
                "a group of channels is the largest divisor of the head dimension up to 32",
                "rows that a protection keeps exact are left out of the ranges; groups stay aligned to the first slot",
                "a crop that cuts into a block that was coded reads it from its codes where the recent rows are gone",
            ),
        ),
        key=SideSpec(bits=2, kind="uniform", axis="channel", group_tokens=32, flush=128),
        value=SideSpec(bits=2, kind="uniform", group_size=32, newest=128),
        key_bits=2,
        value_bits=2,
        claims=(
            Claim("gsm8k", 12.74, "Llama-2-7B, 2 bit, G 32, R 128 (16 bit 13.50)", _TABLE),
            Claim("gsm8k", 20.77, "Llama-2-13B, 2 bit, G 32, R 128 (16 bit 22.67)", _TABLE),
            Claim("gsm8k", 36.01, "Mistral-7B, 2 bit, G 32, R 128 (16 bit 38.36)", _TABLE),
            Claim("longbench/average of 15", 38.30, "LongChat-7B-v1.5-32K, 2 bit (16 bit 38.72)", "arXiv 2402.02750"),
            Claim("longbench/average", 42.43, "Mistral-7B-Instruct-v0.2, 2 bit (16 bit 43.54)", "arXiv 2402.02750"),
            Claim("peak memory, times smaller", 2.6, "Llama-2-7B with weights, A100-80GB", "arXiv 2402.02750, abstract"),
        ),
    )
)
