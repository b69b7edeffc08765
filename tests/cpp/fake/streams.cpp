#include "state.hpp"

using fake::real;
using fake::state;
using fake::try_call;

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned /*flags*/) {
    const fake::Lock lock;
    if (try_call("cudaStreamCreateWithFlags") != cudaSuccess) {
        return cudaErrorLaunchFailure;
    }
    *stream = new CUstream_st;
    state().streams.insert(*stream);
    fake::count(1);
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    const fake::Lock lock;
    stream->run_to(stream->queued);
    state().streams.erase(stream);
    delete stream;
    fake::count(-1);
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    const fake::Lock lock;
    stream = real(stream);
    stream->run_to(stream->queued);
    return try_call("cudaStreamSynchronize");
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned /*flags*/) {
    const fake::Lock lock;
    if (try_call("cudaStreamWaitEvent") != cudaSuccess) {
        return cudaErrorLaunchFailure;
    }
    const CUevent_st now = *event;
    fake::queue(stream, [now] {
        if (now.stream != nullptr && state().streams.count(now.stream) > 0) {
            now.stream->run_to(now.place);
        }
    });
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned /*flags*/) {
    const fake::Lock lock;
    if (try_call("cudaEventCreateWithFlags") != cudaSuccess) {
        return cudaErrorLaunchFailure;
    }
    *event = new CUevent_st;
    fake::count(1);
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    const fake::Lock lock;
    delete event;
    fake::count(-1);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    const fake::Lock lock;
    stream = real(stream);
    *event = {stream, stream->queued};
    return try_call("cudaEventRecord");
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    const fake::Lock lock;
    if (event->stream != nullptr &&
        (event->stream == &state().null_stream || state().streams.count(event->stream) > 0)) {
        event->stream->run_to(event->place);
    }
    return try_call("cudaEventSynchronize");
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t /*start*/, cudaEvent_t /*end*/) {
    const fake::Lock lock;
    *milliseconds = 1.5F;
    return try_call("cudaEventElapsedTime");
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode /*mode*/) {
    const fake::Lock lock;
    if (try_call("cudaStreamBeginCapture", cudaErrorStreamCaptureUnsupported) != cudaSuccess) {
        return cudaErrorStreamCaptureUnsupported;
    }
    stream->capture = new CUgraph_st;
    fake::count(1);
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    const fake::Lock lock;
    *graph = std::exchange(stream->capture, nullptr);
    if (try_call("cudaStreamEndCapture", cudaErrorStreamCaptureUnsupported) != cudaSuccess) {
        cudaGraphDestroy(std::exchange(*graph, nullptr));
        return cudaErrorStreamCaptureUnsupported;
    }
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long /*flags*/) {
    const fake::Lock lock;
    if (try_call("cudaGraphInstantiateWithFlags", cudaErrorMemoryAllocation) != cudaSuccess) {
        return cudaErrorMemoryAllocation;
    }
    *exec = new CUgraphExec_st{graph->work};
    fake::count(1);
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    const fake::Lock lock;
    if (try_call("cudaGraphLaunch") != cudaSuccess) {
        return cudaErrorLaunchFailure;
    }
    for (const std::function<void()>& work : exec->work) {
        fake::queue(stream, work);
    }
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    const fake::Lock lock;
    delete graph;
    fake::count(-1);
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    const fake::Lock lock;
    delete exec;
    fake::count(-1);
    return cudaSuccess;
}
