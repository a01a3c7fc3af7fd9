"""Computes the paper's figures and tables about attention for any causal model.

WAAD is the windowed average attention distance of a token, FAI its future attention influence.
from rhythm.analysis import AnalysisConfig, analyze
from rhythm.analysis.rows import table2_frame

analysis = analyze(model, tokenizer, "gsm8k.jsonl", out="runs/analysis")
table2_frame(analysis)
"""

from rhythm.system.extras import needs

with needs("rhythm.analysis"):
    from rhythm.analysis.config import AnalysisConfig
    from rhythm.analysis.problems import RowError, read_problems
    from rhythm.analysis.response import ResponseResult
    from rhythm.analysis.results import Analysis, read_analysis
    from rhythm.analysis.run import analyze

__all__ = ["Analysis", "AnalysisConfig", "ResponseResult", "RowError", "analyze", "read_analysis", "read_problems"]
