package org.dualtoken.demo

import android.content.Context
import com.google.ai.edge.litert.Accelerator
import com.google.ai.edge.litert.CompiledModel

/** model.tflite by LiteRT on the CPU; Accelerator.GPU takes all but the cast of the pixels (docs/android.md). */
class Model(context: Context, @Suppress("UNUSED_PARAMETER") contract: Contract) {
    private val model =
        CompiledModel.create(context.assets, "model.tflite", CompiledModel.Options(Accelerator.CPU))
    private val inputs = model.createInputBuffers()
    private val outputs = model.createOutputBuffers()

    /** Logits of RGB bytes. */
    fun run(rgb: ByteArray): FloatArray {
        inputs[0].writeInt8(rgb) // bytes as they are: the tensor is uint8
        model.run(inputs, outputs)
        return outputs[0].readFloat()
    }
}
