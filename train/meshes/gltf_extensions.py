"""The extensions of glTF: which are applied, which change nothing that is shown, which are met."""

GLOSSINESS = "KHR_materials_pbrSpecularGlossiness"
TRANSFORM = "KHR_texture_transform"
STRENGTH = "KHR_materials_emissive_strength"
UNLIT = "KHR_materials_unlit"
INSTANCING = "EXT_mesh_gpu_instancing"
VISIBILITY = "KHR_node_visibility"
DRACO = "KHR_draco_mesh_compression"
MESHOPT = ("EXT_meshopt_compression", "KHR_meshopt_compression")
# of textures: other pictures than their own, in formats that are read, and that are not
READ_PICTURES = ("EXT_texture_webp", "MSFT_texture_dds")
UNREAD_PICTURES = ("KHR_texture_basisu", "EXT_texture_avif")

# a file may require these
APPLIED = {
    GLOSSINESS,
    TRANSFORM,
    STRENGTH,
    UNLIT,
    INSTANCING,
    VISIBILITY,
    *READ_PICTURES,
    "KHR_mesh_quantization",
}
# these have a form without them beside, which is read where it has data; a refusal names them
REPLACED = {DRACO, *MESHOPT, *UNREAD_PICTURES}
# lights, sounds, physics, animation, data about the file, and what other states would show
HARMLESS = {
    "KHR_animation_pointer",
    "KHR_audio",
    "KHR_audio_emitter",
    "KHR_audio_graph",
    "KHR_collision_shapes",
    "KHR_implicit_shapes",
    "KHR_interactivity",
    "KHR_lights_punctual",
    "KHR_materials_variants",
    "KHR_node_hoverability",
    "KHR_node_selectability",
    "KHR_physics_rigid_bodies",
    "KHR_rigid_bodies",
    "KHR_xmp",
    "KHR_xmp_json_ld",
    "EXT_feature_metadata",
    "EXT_instance_features",
    "EXT_lights_ies",
    "EXT_lights_image_based",
    "EXT_mesh_features",
    "EXT_structural_metadata",
    "AGI_articulations",
    "AGI_stk_metadata",
    "FB_ngon_encoding",
    "MPEG_animation_timing",
    "MPEG_audio_spatial",
    "MSFT_lod",
    "MSFT_packing_normalRoughnessMetallic",
    "MSFT_packing_occlusionRoughnessMetallic",
    "OMI_collider",
    "OMI_physics_body",
    "OMI_physics_shape",
    "OMI_spawn_point",
    "VRM",
    "VRMC_node_constraint",
    "VRMC_springBone",
    "VRMC_springBone_extended_collider",
    "VRMC_vrm",
    "VRMC_vrm_animation",
}


def refused(document: dict) -> list[str]:
    """List the extensions that a document requires and that are not applied.

    Without those of materials: what they add to a look is noted.
    """
    required = set(document.get("extensionsRequired") or [])
    names = required - APPLIED - HARMLESS
    return sorted(name for name in names if not str(name).startswith("KHR_materials_"))


def lost(document: dict) -> list[str]:
    """List the extensions that stand in a document and whose part of the look is not shown."""
    found = set()
    todo = [document]
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo += value
        elif isinstance(value, dict):
            if isinstance(value.get("extensions"), dict):
                found |= value["extensions"].keys()
            todo += [inner for key, inner in value.items() if key != "extras"]
    return sorted(found - APPLIED - REPLACED - HARMLESS)
