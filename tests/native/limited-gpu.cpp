// A Vulkan layer: whatever device lies below, Mesa's processor too, is a graphics card with memory of its own.
//
//   LIMITED_GPU_BYTES  the size of that memory; 1 GiB without. An allocation for which nothing is left fails.
//   LIMITED_GPU_TAKEN  a file with the bytes that "another program" has there; read whenever that matters
//
// There are two types of memory: the card's, which the host does not see, so that all that goes there is staged as on a
// real one, and the host's. The device below has one for both. A process has one instance and one device, as ggml makes
// them.

#include <vulkan/vk_layer.h>
#include <vulkan/vulkan.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

const char layer_name[] = "VK_LAYER_test_limited_gpu"; // as in the manifest that the tests write
enum memory_type { memory_of_card, memory_of_host };

PFN_vkGetInstanceProcAddr next_of_instance;
PFN_vkGetDeviceProcAddr next_of_device;
VkInstance the_instance;

// What lies below. It is looked up where an instance or a device is made: a loader that is asked later names us.
PFN_vkEnumerateDeviceExtensionProperties next_extensions;
PFN_vkGetPhysicalDeviceMemoryProperties next_memory;
PFN_vkGetPhysicalDeviceMemoryProperties2 next_memory2;
PFN_vkGetPhysicalDeviceProperties next_properties;
PFN_vkGetPhysicalDeviceProperties2 next_properties2;
PFN_vkAllocateMemory next_allocate;
PFN_vkFreeMemory next_free;
PFN_vkGetBufferMemoryRequirements next_requirements;
PFN_vkGetBufferMemoryRequirements2 next_requirements2;
PFN_vkGetMemoryHostPointerPropertiesEXT next_host_pointer;

std::mutex mutex; // of what follows
std::map<VkDeviceMemory, VkDeviceSize> held;
VkDeviceSize used_bytes;

VkDeviceSize total_bytes() {
    const char * bytes = std::getenv("LIMITED_GPU_BYTES");
    return bytes != nullptr ? std::strtoull(bytes, nullptr, 10) : 1ull << 30;
}

// What others leave of it.
VkDeviceSize budget_bytes() {
    VkDeviceSize taken = 0;
    if (const char * path = std::getenv("LIMITED_GPU_TAKEN")) {
        std::ifstream(path) >> taken;
    }
    return total_bytes() - std::min(total_bytes(), taken);
}

void as_card(VkPhysicalDeviceMemoryProperties & memory) {
    const VkDeviceSize host_bytes = memory.memoryHeaps[0].size;
    memory = {};
    memory.memoryHeapCount = memory.memoryTypeCount = 2;
    memory.memoryHeaps[memory_of_card] = { total_bytes(), VK_MEMORY_HEAP_DEVICE_LOCAL_BIT };
    memory.memoryHeaps[memory_of_host] = { host_bytes, 0 };
    memory.memoryTypes[memory_of_card] = { VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT, memory_of_card };
    memory.memoryTypes[memory_of_host] = { VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | VK_MEMORY_PROPERTY_HOST_COHERENT_BIT |
                                               VK_MEMORY_PROPERTY_HOST_CACHED_BIT,
                                           memory_of_host };
}

VKAPI_ATTR void VKAPI_CALL get_memory(VkPhysicalDevice device, VkPhysicalDeviceMemoryProperties * memory) {
    next_memory(device, memory);
    as_card(*memory);
}

VKAPI_ATTR void VKAPI_CALL get_memory2(VkPhysicalDevice device, VkPhysicalDeviceMemoryProperties2 * memory) {
    next_memory2(device, memory);
    as_card(memory->memoryProperties);
    for (auto * more = (VkBaseOutStructure *) memory->pNext; more != nullptr; more = more->pNext) {
        if (more->sType != VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT) {
            continue;
        }
        auto * budget = (VkPhysicalDeviceMemoryBudgetPropertiesEXT *) more;
        const std::lock_guard<std::mutex> lock(mutex);
        budget->heapUsage[memory_of_card] = used_bytes;
        budget->heapBudget[memory_of_card] = std::max(used_bytes, budget_bytes());
        budget->heapUsage[memory_of_host] = 0;
        budget->heapBudget[memory_of_host] = memory->memoryProperties.memoryHeaps[memory_of_host].size;
    }
}

VKAPI_ATTR void VKAPI_CALL get_properties(VkPhysicalDevice device, VkPhysicalDeviceProperties * properties) {
    next_properties(device, properties);
    properties->deviceType = VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU;
}

VKAPI_ATTR void VKAPI_CALL get_properties2(VkPhysicalDevice device, VkPhysicalDeviceProperties2 * properties) {
    next_properties2(device, properties);
    properties->properties.deviceType = VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU;
}

// Those of the device below, and the one by which it says how much memory is left.
VKAPI_ATTR VkResult VKAPI_CALL get_extensions(VkPhysicalDevice device, const char * layer, uint32_t * count,
                                              VkExtensionProperties * found) {
    if (layer != nullptr && std::strcmp(layer, layer_name) == 0) {
        *count = 0;
        return VK_SUCCESS;
    }
    uint32_t below = 0;
    VkResult result = next_extensions(device, layer, &below, nullptr);
    std::vector<VkExtensionProperties> all(below);
    if (result != VK_SUCCESS || (result = next_extensions(device, layer, &below, all.data())) != VK_SUCCESS) {
        return result;
    }
    if (std::none_of(all.begin(), all.end(), [](const VkExtensionProperties & extension) {
            return std::strcmp(extension.extensionName, VK_EXT_MEMORY_BUDGET_EXTENSION_NAME) == 0;
        })) {
        VkExtensionProperties budget = {};
        std::strcpy(budget.extensionName, VK_EXT_MEMORY_BUDGET_EXTENSION_NAME);
        budget.specVersion = 1;
        all.push_back(budget);
    }
    if (found == nullptr) {
        *count = (uint32_t) all.size();
        return VK_SUCCESS;
    }
    const bool whole = *count >= all.size();
    *count = std::min(*count, (uint32_t) all.size());
    std::copy_n(all.begin(), *count, found);
    return whole ? VK_SUCCESS : VK_INCOMPLETE;
}

VKAPI_ATTR VkResult VKAPI_CALL allocate(VkDevice device, const VkMemoryAllocateInfo * info,
                                        const VkAllocationCallbacks * callbacks, VkDeviceMemory * memory) {
    VkMemoryAllocateInfo below = *info;
    below.memoryTypeIndex = 0;
    const bool on_card = info->memoryTypeIndex == memory_of_card;
    const std::lock_guard<std::mutex> lock(mutex);
    if (on_card && used_bytes + info->allocationSize > budget_bytes()) {
        return VK_ERROR_OUT_OF_DEVICE_MEMORY;
    }
    const VkResult result = next_allocate(device, &below, callbacks, memory);
    if (result == VK_SUCCESS && on_card) {
        held[*memory] = info->allocationSize;
        used_bytes += info->allocationSize;
    }
    return result;
}

VKAPI_ATTR void VKAPI_CALL release(VkDevice device, VkDeviceMemory memory, const VkAllocationCallbacks * callbacks) {
    const std::lock_guard<std::mutex> lock(mutex); // before the same handle can be given out again
    const auto it = held.find(memory);
    if (it != held.end()) {
        used_bytes -= it->second;
        held.erase(it);
    }
    next_free(device, memory, callbacks);
}

const uint32_t both_types = 1u << memory_of_card | 1u << memory_of_host;

VKAPI_ATTR void VKAPI_CALL get_requirements(VkDevice device, VkBuffer buffer, VkMemoryRequirements * wanted) {
    next_requirements(device, buffer, wanted);
    wanted->memoryTypeBits = both_types;
}

VKAPI_ATTR void VKAPI_CALL get_requirements2(VkDevice device, const VkBufferMemoryRequirementsInfo2 * info,
                                             VkMemoryRequirements2 * wanted) {
    next_requirements2(device, info, wanted);
    wanted->memoryRequirements.memoryTypeBits = both_types;
}

VKAPI_ATTR VkResult VKAPI_CALL get_host_pointer(VkDevice device, VkExternalMemoryHandleTypeFlagBits type,
                                                const void * pointer, VkMemoryHostPointerPropertiesEXT * properties) {
    const VkResult result = next_host_pointer(device, type, pointer, properties);
    properties->memoryTypeBits = 1u << memory_of_host;
    return result;
}

// Mesa 22.3 looks at every buffer that a set of descriptors names, also at those that a shader does not use, as old
// sets of ggml's do long after the buffers are gone; a Vulkan driver must not. So the handles of buffers stay, of some
// 500 bytes each; their memory goes, and whoever computes with it then is found out.
VKAPI_ATTR void VKAPI_CALL destroy_buffer(VkDevice, VkBuffer, const VkAllocationCallbacks *) {}

// The loader's list of layers is in the structure by which something is made: what is next in it, for whom the list
// then begins behind it. Null: a loader made no such list.
template <typename Link>
auto take_next(const void * chain, VkStructureType type) {
    auto * link = (Link *) chain;
    while (link != nullptr && (link->sType != type || link->function != VK_LAYER_LINK_INFO)) {
        link = (Link *) link->pNext;
    }
    const auto next = link != nullptr ? link->u.pLayerInfo : nullptr;
    if (next != nullptr) {
        link->u.pLayerInfo = next->pNext;
    }
    return next;
}

template <typename Function, typename Next, typename Of>
void look_up(Function & function, Next next, Of of, const char * name) {
    function = (Function) next(of, name);
}

VKAPI_ATTR VkResult VKAPI_CALL create_instance(const VkInstanceCreateInfo * info,
                                               const VkAllocationCallbacks * callbacks, VkInstance * instance) {
    const auto next = take_next<VkLayerInstanceCreateInfo>(info->pNext, VK_STRUCTURE_TYPE_LOADER_INSTANCE_CREATE_INFO);
    if (next == nullptr) {
        return VK_ERROR_INITIALIZATION_FAILED;
    }
    next_of_instance = next->pfnNextGetInstanceProcAddr;
    const auto create = (PFN_vkCreateInstance) next_of_instance(nullptr, "vkCreateInstance");
    const VkResult result = create(info, callbacks, instance);
    if (result == VK_SUCCESS) {
        the_instance = *instance;
        look_up(next_extensions, next_of_instance, *instance, "vkEnumerateDeviceExtensionProperties");
        look_up(next_memory, next_of_instance, *instance, "vkGetPhysicalDeviceMemoryProperties");
        look_up(next_memory2, next_of_instance, *instance, "vkGetPhysicalDeviceMemoryProperties2");
        look_up(next_properties, next_of_instance, *instance, "vkGetPhysicalDeviceProperties");
        look_up(next_properties2, next_of_instance, *instance, "vkGetPhysicalDeviceProperties2");
    }
    return result;
}

VKAPI_ATTR VkResult VKAPI_CALL create_device(VkPhysicalDevice physical, const VkDeviceCreateInfo * info,
                                             const VkAllocationCallbacks * callbacks, VkDevice * device) {
    const auto next = take_next<VkLayerDeviceCreateInfo>(info->pNext, VK_STRUCTURE_TYPE_LOADER_DEVICE_CREATE_INFO);
    if (next == nullptr) {
        return VK_ERROR_INITIALIZATION_FAILED;
    }
    next_of_device = next->pfnNextGetDeviceProcAddr;
    const auto create = (PFN_vkCreateDevice) next->pfnNextGetInstanceProcAddr(the_instance, "vkCreateDevice");
    const VkResult result = create(physical, info, callbacks, device);
    if (result == VK_SUCCESS) {
        look_up(next_allocate, next_of_device, *device, "vkAllocateMemory");
        look_up(next_free, next_of_device, *device, "vkFreeMemory");
        look_up(next_requirements, next_of_device, *device, "vkGetBufferMemoryRequirements");
        look_up(next_requirements2, next_of_device, *device, "vkGetBufferMemoryRequirements2");
        look_up(next_host_pointer, next_of_device, *device, "vkGetMemoryHostPointerPropertiesEXT");
    }
    return result;
}

VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL of_instance(VkInstance instance, const char * name);
VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL of_device(VkDevice device, const char * name);

PFN_vkVoidFunction ours(const std::string & name) {
    static const std::map<std::string, PFN_vkVoidFunction> functions = {
        { "vkGetInstanceProcAddr", (PFN_vkVoidFunction) of_instance },
        { "vkGetDeviceProcAddr", (PFN_vkVoidFunction) of_device },
        { "vkCreateInstance", (PFN_vkVoidFunction) create_instance },
        { "vkCreateDevice", (PFN_vkVoidFunction) create_device },
        { "vkEnumerateDeviceExtensionProperties", (PFN_vkVoidFunction) get_extensions },
        { "vkGetPhysicalDeviceMemoryProperties", (PFN_vkVoidFunction) get_memory },
        { "vkGetPhysicalDeviceMemoryProperties2", (PFN_vkVoidFunction) get_memory2 },
        { "vkGetPhysicalDeviceMemoryProperties2KHR", (PFN_vkVoidFunction) get_memory2 },
        { "vkGetPhysicalDeviceProperties", (PFN_vkVoidFunction) get_properties },
        { "vkGetPhysicalDeviceProperties2", (PFN_vkVoidFunction) get_properties2 },
        { "vkGetPhysicalDeviceProperties2KHR", (PFN_vkVoidFunction) get_properties2 },
        { "vkAllocateMemory", (PFN_vkVoidFunction) allocate },
        { "vkFreeMemory", (PFN_vkVoidFunction) release },
        { "vkDestroyBuffer", (PFN_vkVoidFunction) destroy_buffer },
        { "vkGetBufferMemoryRequirements", (PFN_vkVoidFunction) get_requirements },
        { "vkGetBufferMemoryRequirements2", (PFN_vkVoidFunction) get_requirements2 },
        { "vkGetBufferMemoryRequirements2KHR", (PFN_vkVoidFunction) get_requirements2 },
        { "vkGetMemoryHostPointerPropertiesEXT", (PFN_vkVoidFunction) get_host_pointer },
    };
    const auto it = functions.find(name);
    return it != functions.end() ? it->second : nullptr;
}

VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL of_instance(VkInstance instance, const char * name) {
    const PFN_vkVoidFunction own = ours(name);
    return own != nullptr || next_of_instance == nullptr ? own : next_of_instance(instance, name);
}

VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL of_device(VkDevice device, const char * name) {
    const PFN_vkVoidFunction own = ours(name);
    const PFN_vkVoidFunction below = next_of_device != nullptr ? next_of_device(device, name) : nullptr;
    return own != nullptr && below != nullptr ? own : below; // what the device lacks, we have not either
}

} // namespace

extern "C" __attribute__((visibility("default"))) VKAPI_ATTR VkResult VKAPI_CALL
vkNegotiateLoaderLayerInterfaceVersion(VkNegotiateLayerInterface * version) {
    version->loaderLayerInterfaceVersion = std::min(version->loaderLayerInterfaceVersion, 2u);
    version->pfnGetInstanceProcAddr = of_instance;
    version->pfnGetDeviceProcAddr = of_device;
    version->pfnGetPhysicalDeviceProcAddr = nullptr;
    return VK_SUCCESS;
}
