package sessionmill;

import io.delta.storage.CloseableIterator;
import io.delta.storage.HadoopFileSystemLogStore;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.FileAlreadyExistsException;
import java.util.ArrayList;
import java.util.Iterator;
import java.util.List;
import org.apache.hadoop.conf.Configuration;
import org.apache.hadoop.fs.FSDataOutputStream;
import org.apache.hadoop.fs.FSDataOutputStreamBuilder;
import org.apache.hadoop.fs.FileSystem;
import org.apache.hadoop.fs.Path;
import org.apache.hadoop.fs.s3a.RemoteFileChangedException;

/**
 * Delta's commits on S3 by any number of writers: a version's file is put only if it is not there
 * (If-None-Match). Delta's own store for S3 is safe within one JVM only, its other one needs
 * DynamoDB. delta-rs commits in this way, too, so both can write to one table.
 *
 * <p>Hadoop's client sends the condition only where a file is made by `createFile` with the option
 * below; its `create(path, false)` asks first and then overwrites, whatever
 * `fs.s3a.create.conditional.enabled` says.
 */
public class ConditionalPutLogStore extends HadoopFileSystemLogStore {
  private static final String ONLY_IF_ABSENT = "fs.option.create.conditional.overwrite";

  public ConditionalPutLogStore(Configuration hadoopConf) {
    super(hadoopConf);
  }

  @Override
  public void write(Path path, Iterator<String> actions, Boolean overwrite, Configuration conf)
      throws IOException {
    List<String> lines = new ArrayList<>();
    actions.forEachRemaining(lines::add);
    FileSystem fs = path.getFileSystem(conf);
    FSDataOutputStreamBuilder<?, ?> file = fs.createFile(path);
    file.overwrite(true);
    if (!overwrite) {
      file.must(ONLY_IF_ABSENT, true);
    }
    try (FSDataOutputStream stream = file.build()) {
      for (String line : lines) {
        stream.write((line + "\n").getBytes(StandardCharsets.UTF_8));
      }
    } catch (RemoteFileChangedException refused) {
      // A put whose answer was lost is sent again by the client, and then finds itself.
      if (!isThere(path, lines, conf)) {
        throw (IOException) new FileAlreadyExistsException(path.toString()).initCause(refused);
      }
    }
  }

  private boolean isThere(Path path, List<String> lines, Configuration conf) throws IOException {
    List<String> found = new ArrayList<>();
    try (CloseableIterator<String> reading = read(path, conf)) {
      reading.forEachRemaining(found::add);
    }
    return found.equals(lines);
  }

  @Override
  public Boolean isPartialWriteVisible(Path path, Configuration conf) {
    return false;
  }
}
