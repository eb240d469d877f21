/* Stands where TensorRT's bindings look for its libraries, and passes their few entry points on to another library of the same generation, each
 * call with that library's own version number. Without such a library (TARGET is empty) the bindings can be imported and looked at, nothing more. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

static void *find(const char *symbol) {
    static void *library;
    if (!library) library = dlopen(TARGET, RTLD_NOW | RTLD_GLOBAL);
    void *found = library && TARGET[0] ? dlsym(library, symbol) : NULL;
    if (!found) {
        fprintf(stderr, "no %s in '%s': %s\n", symbol, TARGET, dlerror());
        abort();
    }
    return found;
}

static int version(const char *symbol) { return ((int (*)(void))find(symbol))(); }

int getInferLibVersion(void) { return version("getInferLibVersion"); }
int getNvOnnxParserVersion(void) { return version("getNvOnnxParserVersion"); }
void *getPluginRegistry(void) { return ((void *(*)(void))find("getPluginRegistry"))(); }
void *getBuilderPluginRegistry(int kind) { return ((void *(*)(int))find("getBuilderPluginRegistry"))(kind); }
int initLibNvInferPlugins(void *logger, const char *space) { return logger || space || 1; }

#define ONE(symbol, asked) \
    void *symbol(void *a, int unused) { return ((void *(*)(void *, int))find(#symbol))(a, unused * 0 + version(asked)); }
#define TWO(symbol, asked) \
    void *symbol(void *a, void *b, int unused) { return ((void *(*)(void *, void *, int))find(#symbol))(a, b, unused * 0 + version(asked)); }
ONE(createInferBuilder_INTERNAL, "getInferLibVersion")
ONE(createInferRuntime_INTERNAL, "getInferLibVersion")
TWO(createInferRefitter_INTERNAL, "getInferLibVersion")
TWO(createNvOnnxParser_INTERNAL, "getNvOnnxParserVersion")
TWO(createNvOnnxParserRefitter_INTERNAL, "getNvOnnxParserVersion")
