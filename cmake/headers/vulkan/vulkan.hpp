// The system's <vulkan/vulkan.hpp>, and what ggml's backend takes from newer ones: headers before 1.3.272 (Debian 12,
// Ubuntu 22.04) do not know VK_EXT_layer_settings. It is used with GGML_VULKAN_VALIDATE alone; where a loader does not
// know such a structure it passes over it.
#pragma once

#include_next <vulkan/vulkan.hpp>

#ifndef VK_EXT_LAYER_SETTINGS_EXTENSION_NAME

#include <vector>

namespace vk {

enum class LayerSettingTypeEXT { eBool32 = 0 };

struct LayerSettingEXT {
    const char * pLayerName;
    const char * pSettingName;
    LayerSettingTypeEXT type;
    uint32_t valueCount;
    const void * pValues;
};

struct LayerSettingsCreateInfoEXT {
    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> & settings)
        : settingCount((uint32_t) settings.size()), pSettings(settings.data()) {}

    VkStructureType sType = (VkStructureType) 1000496000;
    const void * pNext = nullptr;
    uint32_t settingCount;
    const LayerSettingEXT * pSettings;
};

} // namespace vk

#endif
