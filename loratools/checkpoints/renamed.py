"""Families whose modules transformers 5 calls otherwise than their files do."""

from __future__ import annotations

from typing import Final

RENAMED_FAMILIES: Final = frozenset(
    {
        "altclip", "altclip_vision_model", "apertus1p5_text", "aria", "audio-spectrogram-transformer",
        "audioflamingo3", "axk1", "axk2", "aya_vision", "bailing_hybrid", "beit", "chinese_clip_vision_model",
        "clip_text_model", "clip_vision_model", "clipseg_text_model", "clipseg_vision_model", "cohere_asr",
        "colqwen2", "conditional_detr", "cosmos3_edge", "cosmos3_omni", "d_fine", "deepseek_ocr2", "deepseek_v4",
        "deformable_detr", "deit", "detr", "dinov2", "dinov2_with_registers", "dinov3_convnext", "dinov3_vit", "dory",
        "dots3_note", "dots3_note_audio_encoder", "dots3_note_vision_encoder", "emu3", "ernie4_5_moe",
        "ernie4_5_vl_moe", "esm", "exaone", "exaone_moe",
        "flint", "fuyu", "gemma3", "gemma3n_text", "gemma4_unified", "glm5_next", "glm5_next_text",
        "glmasr", "got_ocr2", "gpt_neox", "gradium_phonon_tts", "granite_speech", "granite_speech_plus", "gte",
        "hrm_text", "hunyuan_vl", "hy_v3", "hy_v4", "hy_v4_vl", "hy_v4_vl_text", "hyperclovax_vision_v2", "ijepa",
        "inkling2", "inkling2_loop", "inkling2_loop_text", "inkling2_text", "inkling_mm_model", "internvl", "jev",
        "jina_embeddings_v3", "kimi_k25", "kimi_linear", "kolibri1", "laguna", "lara_mini", "lfm3", "lfm3_vl_vision",
        "llava", "llava_next", "llava_next_video", "llava_onevision", "lw_detr", "maskformer",
        "metaclip_2_text_model", "metaclip_2_vision_model", "mimi", "mimi_decoder", "mimi_encoder", "mimo_v2_flash",
        "minimax_m3_vl", "mistral3", "mistral_large4", "mistral_large4_text", "mlcd", "mllama", "molmo2",
        "molmo2_text", "musicflamingo", "nemo_speechlm", "nemotron_h", "nemotron_h_omni", "nomic_bert", "olmo_hybrid",
        "paddleocr_vl", "paligemma", "phimoe", "pi0", "pixio", "pp_chart2table", "pp_doclayout_v2", "pp_doclayout_v3",
        "pp_doclayout_v4", "qianfan_ocr", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_audio", "qwen2_vl",
        "qwen3_5_moe_text", "qwen3_5_text", "qwen3_omni_moe_thinker", "qwen4_exp_text", "radio", "rf_detr", "rt_detr",
        "rt_detr_v2", "sam3_tracker", "sam3_tracker_video", "sapiens2", "sarvam_moe", "segformer", "shieldgemma2",
        "siglip2_text_model", "siglip2_vision_model", "siglip_text_model", "siglip_vision_model", "step3p5_vision",
        "step3p7", "swin", "t5gemma2_encoder", "timesfm2_5", "timm_wrapper", "tipsv2", "tipsv2_dpt",
        "tipsv2_text_model", "tipsv2_vision_model", "ultrabert", "ultravbert", "unlimited_ocr",
        "unlimited_ocr_sam_vision_model", "unlimited_ocr_vision_encoder", "vibevoice_asr", "video_llava", "videomae",
        "vipllava", "vit", "vit_mae", "vit_msn", "vivit", "voxtral", "voxtral_realtime", "yolos",
    }
)  # fmt: skip
"""`model_type` of families with a renaming of other modules than experts in `transformers/conversion_mapping.py`, 5.24.

What is listed there by class stands here under the `model_type` of that class's configuration.
"""


def is_renamed(family: object) -> bool:
    """Whether transformers 5 renames modules of this `model_type` when it loads a file."""
    return isinstance(family, str) and family in RENAMED_FAMILIES
