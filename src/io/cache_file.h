// Files in a folder that several processes use at once: each is there whole, or not at all, and what another user could
// have written is not believed.
#pragma once

#include "io/file.h"

#include <functional>
#include <string>

namespace superllama {

class cache_dir {
  public:
    // `path` is a cache place, `name` a folder in it; with `make` both are made where they are missing, for this user
    // only. False with *why, which is also said where the folder belongs to another user, or others may write in it.
    bool open(const std::string & path, const std::string & name, bool make, std::string * why);

    // A regular file of this user or root that nobody else may write, opened with `flags`; else none and *why.
    descriptor file(const std::string & name, int flags, std::string * why) const;

    bool has(const std::string & name) const; // something of this name, trusted or not

    // Removes what writers left that were killed. Those that live are known by their locks; where locks are not shared
    // by all who see the folder (network filesystems), by when they last wrote.
    void remove_leftovers() const;

    bool in_memory() const; // on a filesystem that is memory itself

    int fd() const { return folder.get(); }
    const std::string & path() const { return name; }

  private:
    std::string name;
    descriptor folder;
};

// A file on its way into the folder. Until publish() it has no name there, or one that nobody else uses.
class cache_writer {
  public:
    // `unnamed` false: with a name, as on filesystems that know no files without.
    cache_writer(const cache_dir & dir, bool unnamed = true) : dir(dir), unnamed(unnamed) {}
    ~cache_writer(); // leaves nothing, unless published

    cache_writer(const cache_writer &) = delete;
    cache_writer & operator=(const cache_writer &) = delete;

    bool create(uint64_t bytes, std::string * why); // with room on the disk
    bool write(const void * data, size_t bytes, uint64_t offset, std::string * why);
    bool finish(std::string * why); // all is on the disk

    // Gives it its name in one step. Where another one has it by now and `is_good` says so, that one stays.
    bool publish(const std::string & name, const std::function<bool()> & is_good, std::string * why);

    int fd() const { return handle.get(); }

  private:
    bool link_as(const std::string & name);

    const cache_dir & dir;
    bool unnamed;
    bool direct = false;
    descriptor handle;
    std::string temporary; // its name; "" where it has none
};

} // namespace superllama
