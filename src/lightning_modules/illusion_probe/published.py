"""Zero-shot recalls that the paper shows, read from its figure: other models and other pictures than ours."""

from __future__ import annotations

PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "Illusion_IN": {
        "BLIP-2-T5": (14.9, 73.4), "CogVLM": (17.7, 65.3), "InstructBLIP-T5": (17.4, 63.6),
        "InstructBLIP-7B": (19.9, 15.4), "InstructBLIP-13B": (26.0, 17.6), "LLaVA-1.5-7B": (26.4, 53.7),
        "LLaVA-1.5-13B": (23.4, 42.7), "LLaVA-1.6-7B": (18.7, 64.9), "Qwen-VL": (16.9, 54.0),
        "MoE-LLaVA StableLM": (10.8, 42.7), "MoE-LLaVA Qwen": (11.9, 47.0), "MoE-LLaVA Phi2": (15.4, 46.1),
        "GPT-4o": (35.1, 41.9), "Gemini-Flash": (31.5, 47.8),
    },
    "Illusion_LOGO": {
        "BLIP-2-T5": (24.4, 48.3), "CogVLM": (21.6, 66.7), "InstructBLIP-T5": (20.3, 52.1),
        "InstructBLIP-7B": (25.7, 8.9), "InstructBLIP-13B": (25.1, 31.0), "LLaVA-1.5-7B": (24.6, 54.2),
        "LLaVA-1.5-13B": (26.9, 41.5), "LLaVA-1.6-7B": (15.3, 70.6), "Qwen-VL": (21.7, 34.3),
        "MoE-LLaVA StableLM": (20.6, 15.0), "MoE-LLaVA Qwen": (21.4, 29.7), "MoE-LLaVA Phi2": (24.7, 36.8),
        "GPT-4o": (22.0, 53.3), "Gemini-Flash": (34.0, 38.5),
    },
    "Illusion_ICON": {
        "BLIP-2-T5": (4.7, 88.1), "CogVLM": (12.3, 74.3), "InstructBLIP-T5": (10.4, 83.4),
        "InstructBLIP-7B": (1.1, 15.9), "InstructBLIP-13B": (7.8, 37.0), "LLaVA-1.5-7B": (11.8, 72.6),
        "LLaVA-1.5-13B": (11.0, 57.6), "LLaVA-1.6-7B": (13.7, 66.6), "Qwen-VL": (6.0, 68.4),
        "MoE-LLaVA StableLM": (15.6, 35.7), "MoE-LLaVA Qwen": (9.8, 56.5), "MoE-LLaVA Phi2": (13.4, 70.9),
        "GPT-4o": (21.4, 64.1), "Gemini-Flash": (27.4, 55.3),
    },
}  # fmt: skip
"""By subset and model: shape recall and scene recall on the shape question, per cent (+- .1; total figure, "shape")."""
